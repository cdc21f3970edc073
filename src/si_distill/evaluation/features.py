"""Feature extractors for torch-fidelity that need no download."""

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

#: Name under which torch-fidelity knows the extractor; no weights, so nothing to hash.
PIXELS = "si-distill-pixels"


class PixelFeatures(FeatureExtractorBase):
    """The image itself: uint8 / 127.5 − 1, flattened, float64. Of use for small images such as the digits only."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pixels"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Images (B, C, H, W), uint8, to features (B, C·H·W)."""
        return (images.flatten(1).double() / 127.5 - 1,)


register_feature_extractor(PIXELS, PixelFeatures)
