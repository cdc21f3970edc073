from .transformer_sit import SIT_PRESETS, SiTTransformer2DModel

__all__ = ["SIT_PRESETS", "SiTTransformer2DModel"]
