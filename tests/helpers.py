"""Small real objects that many tests build."""

import torch

from si_distill.models import SiTTransformer2DModel


def tiny_sit(seed: int = 0, **config) -> SiTTransformer2DModel:
    """A SiT of a few thousand parameters whose zero-initialised layers are random, so that every path matters."""
    defaults = dict(
        sample_size=8,
        patch_size=4,
        in_channels=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=3,
        timestep_scale=100.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiTTransformer2DModel(**{**defaults, **config})
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()
