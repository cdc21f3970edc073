"""Finished networks with further inputs, which say at first exactly what they said without."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

Network = TypeVar("Network", bound=ModelMixin)
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def extend_network(network: Network, **arguments: int) -> Network:
    """A copy with other sizes of its further inputs, e.g. `condition_channels=6` or `augment_dim=9`; new weights are zero.

    With zeros in the new inputs' weights the copy's output is the original's, whatever is put in.

    Args:
        network: of a class that has these arguments.
        arguments: the new sizes, not smaller than the old ones.

    Raises:
        ValueError: for a class without such an input, or a smaller size.
    """
    # Without diffusers' own keys: one of them would put back what a folder from before an argument left to its default.
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    for name, size in arguments.items():
        if config.get(name) is None:
            raise ValueError(f"A {type(network).__name__} has no `{name}`: it cannot be given that input.")
        if size < config[name]:
            raise ValueError(f"The network's `{name}` is {config[name]} and can only grow, but {size} was asked for.")
    weights = network.state_dict()
    kind = next(iter(weights.values()))
    with kind.device:  # also the meta device, on which a dry run counts
        extended = type(network).from_config({**config, **arguments}).to(kind.dtype).train(network.training)
    extended.load_state_dict({name: _grown(weights.get(name), new) for name, new in extended.state_dict().items()})
    return extended


def extend_pipeline(pipeline: Pipeline, condition_channels: int) -> Pipeline:
    """The pipeline with a network that sees an image of so many channels beside x_t, and does not heed it yet.

    Raises:
        ValueError: as `extend_network`.
    """
    network = extend_network(pipeline.transformer, condition_channels=condition_channels)
    _, settings = pipeline._get_signature_keys(pipeline)  # what the constructor takes beside the components
    config = {name: pipeline.config[name] for name in settings if name in pipeline.config}
    return type(pipeline)(**{**config, **pipeline.components, "transformer": network})


def _grown(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """The old weights, with zeros for inputs (axis 1) that are new."""
    if old is None:
        return torch.zeros_like(new)
    missing = new.shape[1] - old.shape[1] if old.ndim > 1 else 0
    return F.pad(old, (*[0, 0] * (old.ndim - 2), 0, missing)) if missing else old
