from .transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from .unet_edm import EDMUNet2DModel
from .unet_edm2 import EDM2_PRESETS, EDM2UNet2DModel

__all__ = ["EDM2_PRESETS", "SIT_PRESETS", "EDM2UNet2DModel", "EDMUNet2DModel", "SiTTransformer2DModel"]
