"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class EMA:
    """A frozen copy of a network that follows it: θ̄ ← d θ̄ + (1 − d) θ with d = min(decay, (1 + n) / (10 + n)).

    The warm-up (as in Diffusers' `EMAModel`) forgets the initial weights in the first updates. Buffers are copied, not
    averaged. `EMAModel` itself is not used: its list of shadow tensors does not survive sharding.

    Args:
        network: the copy to keep the average in; made frozen and put in evaluation mode.
        decay: the final decay.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = network.requires_grad_(False).eval()
        self.decay = decay

    @classmethod
    def of(cls, network: nn.Module, decay: float) -> "EMA":
        """An average that starts at the network's present weights."""
        return cls(copy.deepcopy(network), decay)

    def decay_at(self, updates: int) -> float:
        """The decay used at update number `updates`, counted from 0."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Moves the average towards `network` after its update number `updates`, counted from 0."""
        average = list(self.network.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - self.decay_at(updates))
        for target, source in zip(self.network.buffers(), network.buffers(), strict=True):
            target.copy_(source)
