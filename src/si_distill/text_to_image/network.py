"""A stock text-to-image network behind the contract that pipelines and trainers know (see `NetworkView`)."""

import copy
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..pipelines.interpolant_condition import Condition
from ..pipelines.interpolant_pipeline_network import VIEWS, NetworkView, listening
from .adapters import Adapters
from .conventions import Convention


class TextNetwork(nn.Module):
    """
    A network that is told a text.

    With `adapters` a copy (`copy.deepcopy`) is not a second network but an adapter of its own on the same frozen one, equal
    to what was copied; its parameters are those of the adapter alone. Without them a copy is a network.

    Args:
        base: the stock network.
        convention: of its pipeline.
        sample_shape: (C, H, W) of latents.
        adapters: of `base`, or None.
        adapter: the name of this one's, or None for `base` as it is.
    """

    def __init__(
        self,
        base: ModelMixin,
        convention: Convention,
        sample_shape: tuple[int, int, int],
        adapters: Adapters | None = None,
        adapter: str | None = None,
    ):
        super().__init__()
        self.convention, self.adapters, self.adapter = convention, adapters, adapter
        self.null: Condition | None = None
        if adapter is None:
            self.base = base
        else:
            object.__setattr__(self, "base", base)  # not a part of this module: frozen, and the teacher's
            self.weights = adapters.modules(adapter)
        self.config = SimpleNamespace(
            in_channels=sample_shape[0],
            sample_size=sample_shape[1:],
            num_classes=0,
            _name_or_path=getattr(base.config, "_name_or_path", ""),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextNetwork":
        if self.adapters is None:
            return self.around(copy.deepcopy(self.base, memo))
        return self.around(self.base, self.adapters.add(self.adapter))

    def around(self, base: ModelMixin, adapter: str | None = None) -> "TextNetwork":
        """The same around another stock network, or this one with another adapter."""
        shape = (self.config.in_channels, *self.config.sample_size)
        new = TextNetwork(base, self.convention, shape, self.adapters, adapter)
        new.null = self.null
        return new

    @property
    def shares_base(self) -> bool:
        """Whether this is an adapter on a network that others use too."""
        return self.adapter is not None

    def worn(self) -> AbstractContextManager[None]:
        """`base` is this network meanwhile: it has this one's adapter inside."""
        return nullcontext() if self.adapters is None else self.adapters.use(self.adapter)

    def forward(
        self,
        network_input: torch.Tensor,
        timesteps: torch.Tensor,
        labels: None = None,
        return_dict: bool = False,
        guidance: torch.Tensor | None = None,
        return_features: bool = False,
        **text: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """(B, C, H, W) latents and the network's own times (B,) to the prediction, and if asked for to the hidden tokens
        (B, N, D) of its middle.
        """
        dtype = next(self.base.parameters()).dtype
        text = {name: value.to(dtype) if value.is_floating_point() else value for name, value in text.items()}
        features, found = self.convention.features, []
        looking = listening(features.module(self.base), found) if return_features else nullcontext()
        with self.worn(), looking:
            prediction = self.convention.call(self.base, network_input.to(dtype), timesteps, text, guidance)
        return (prediction, features.tokens(found[0])) if return_features else (prediction,)


class _TextView(NetworkView):
    """Latents of any height and width, no classes; the null condition is a text."""

    num_classes = 0
    null_class = None
    augment_dim = None

    @property
    def sample_shape(self):
        return (self.bare.config.in_channels, *self.bare.config.sample_size)

    @property
    def null(self):
        return self.bare.null

    @property
    def feature_width(self):
        return self.bare.convention.features.width(self.bare.base.config)


VIEWS[TextNetwork] = _TextView


def shares_base(network: nn.Module) -> bool:
    """Whether what is trained in a network are adapters."""
    return any(isinstance(module, TextNetwork) and module.shares_base for module in network.modules())


def has_text(network: nn.Module) -> bool:
    """Whether a network, or one inside it, is told a text."""
    return any(isinstance(module, TextNetwork) for module in network.modules())


def adapter_parameters(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of all adapters inside a stock network."""
    return {parameter for name, parameter in network.named_parameters() if ".lora_" in name}
