"""Copies of finished networks that are changed in one respect: inputs, positions, or fresh weights."""

from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin

from .transformer_sit import SiTTransformer2DModel

Network = TypeVar("Network", bound=ModelMixin)
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def extend_network(network: Network, zero: bool = True, **arguments: int) -> Network:
    """A copy with other sizes of its further inputs, e.g. `condition_channels=6` or `augment_dim=9`.

    While the weights of the new inputs are zero, the copy's output equals the original's for any input.

    Args:
        network: of a class that has these arguments.
        zero: whether the new weights are zero; otherwise they are drawn as a fresh layer's (Xavier, as patch embeddings).
        arguments: the new sizes, not smaller than the old ones.

    Raises:
        ValueError: for a class without such an input, or a smaller size.
    """
    config = _own_config(network)
    for name, size in arguments.items():
        if config.get(name) is None:
            raise ValueError(f"A {type(network).__name__} has no `{name}`: it cannot be given that input.")
        if size < config[name]:
            raise ValueError(f"The network's `{name}` is {config[name]} and can only grow, but {size} was asked for.")
    extended, weights = _rebuilt(network, **arguments), network.state_dict()
    extended.load_state_dict(
        {name: _grown(weights.get(name), new, zero) for name, new in extended.state_dict().items()}
    )
    return extended


def extend_pipeline(pipeline: Pipeline, condition_channels: int) -> Pipeline:
    """The pipeline with a network that takes an image of this many extra channels, with zero weights at first.

    Raises:
        ValueError: as `extend_network`.
    """
    network = extend_network(pipeline.transformer, condition_channels=condition_channels)
    _, settings = pipeline._get_signature_keys(pipeline)  # what the constructor takes next to the components
    config = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    return type(pipeline)(**{**config, **pipeline.components, "transformer": network})


def with_learned_positions(network: Network) -> Network:
    """A copy whose position embedding is a parameter: the public loop of si-adistill trains it, sines at first.

    Raises:
        ValueError: for a class other than SiT's.
    """
    if not isinstance(network, SiTTransformer2DModel):
        raise ValueError(f"A {type(network).__name__} has no `learned_positions`; only SiT's networks have.")
    copied = _rebuilt(network, learned_positions=True)
    copied.load_state_dict({**network.state_dict(), "pos_embed.pos_embed": network.pos_embed.pos_embed})
    return copied


def fresh_network(network: Network) -> Network:
    """A network of the same config with random weights: as its class draws them or, for diffusers' UNet, as torchcfm's class
    (guided-diffusion) does, with zeros in the last layer of every residual and attention block and of the output.
    """
    fresh = type(network).from_config(_own_config(network))
    if isinstance(fresh, UNet2DModel):
        for name, module in fresh.named_modules():
            if name.endswith(("conv2", "to_out.0", "conv_out")):
                for parameter in module.parameters():
                    torch.nn.init.zeros_(parameter)
    return fresh


def _rebuilt(network: Network, **changes: Any) -> Network:
    """A network of the same class, device, precision and mode with other values in its config, and fresh weights."""
    kind = next(network.parameters())
    with kind.device:  # also the meta device, on which a dry run counts
        rebuilt = type(network).from_config({**_own_config(network), **changes})
    rebuilt = rebuilt if rebuilt.dtype == kind.dtype else rebuilt.to(kind.dtype)
    return rebuilt.train(network.training)


def _own_config(network: ModelMixin) -> dict[str, Any]:
    """Without diffusers' own keys: one of them would put back what a folder from before an argument left to its default."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def _grown(old: torch.Tensor | None, new: torch.Tensor, zero: bool) -> torch.Tensor:
    """The old weights, with others for inputs (axis 1) that are new."""
    if old is not None and (old.ndim == 1 or old.shape[1] == new.shape[1]):
        return old
    kept = 0 if old is None else old.shape[1]
    added = new.new_zeros(new[:, kept:].shape) if new.ndim > 1 else torch.zeros_like(new)
    if not zero and new.ndim > 1:
        torch.nn.init.xavier_uniform_(added.flatten(1))
    return added if old is None else torch.cat([old, added], 1)
