from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "transformer_sit": ("SIT_PRESETS", "SiTTransformer2DModel"),
        "unet_edm": ("EDMUNet2DModel",),
        "unet_edm2": ("EDM2_PRESETS", "EDM2UNet2DModel"),
    },
)
