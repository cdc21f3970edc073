"""Small real objects that many tests build."""

import torch
from torch import nn

from si_distill import Condition, Field, Interpolant, StochasticInterpolantScheduler
from si_distill.critic import CriticNetwork
from si_distill.models import EDM2UNet2DModel, EDMUNet2DModel, SiTTransformer2DModel
from si_distill.pipelines import view_network

#: Nothing is told: of functions that stand for networks.
UNTOLD = Condition()


def field_on(interpolant: Interpolant, network, prediction_type: str = "velocity", timestep_type: str = "time", **rest):
    """A field on a path. `network` is one of ours or of diffusers, or a function of (network_input, times)."""
    view = view_network(network) if isinstance(network, nn.Module) else lambda x, t, _: (network(x, t),)
    scheduler = StochasticInterpolantScheduler(
        interpolant=interpolant.name,
        interpolant_kwargs=interpolant.config,
        prediction_type=prediction_type,
        timestep_type=timestep_type,
        init_time=interpolant.start_time(prediction_type, timestep_type),
    )
    return Field(view, scheduler, **rest)


def said(network, x, t, labels=None, **told) -> tuple[torch.Tensor, ...]:
    """What a network gives, or a critic with all that it has besides its prediction."""
    if isinstance(network, CriticNetwork):
        return network(x, t, Condition(labels, image=told.get("condition"), augment=told.get("augment_labels")))
    return network(x, t, labels, return_dict=False, **told)


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


EDM_KINDS = {
    "ddpmpp": dict(architecture="ddpmpp", model_channels=8, channel_mult=[1, 2], attn_resolutions=[8]),
    "ncsnpp": dict(architecture="ncsnpp", model_channels=8, channel_mult=[2, 2, 1], attn_resolutions=[8]),
    "adm": dict(
        architecture="adm", model_channels=16, channel_mult=[1, 2], attn_resolutions=[4], attention_head_dim=16
    ),
}


def tiny_edm(kind: str, **config) -> EDMUNet2DModel:
    """A network of a few thousand parameters, all of them random, so that every path matters."""
    shape = dict(sample_size=8, in_channels=3, num_classes=3, augment_dim=2, num_blocks=1, channel_mult_emb=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EDMUNet2DModel(**{**shape, **EDM_KINDS[kind], **config})
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    return network.eval()


def tiny_edm2(**config) -> EDM2UNet2DModel:
    """A network of a few thousand parameters whose gains are not 0, so that every path matters."""
    shape = dict(sample_size=8, in_channels=4, num_classes=3, model_channels=16, channel_mult=[1, 2], num_blocks=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EDM2UNet2DModel(**{**shape, "attn_resolutions": [4], "attention_head_dim": 8, **config})
        for parameter in network.parameters():
            if parameter.ndim == 0:
                torch.nn.init.uniform_(parameter, 0.5, 1.0)
    return network.eval()
