"""The critic: its network, and what it gives beside the prediction in the same forward."""

import math

import torch
from torch import nn

from .pipelines.interpolant_pipeline_network import view_network


class LogVariance(nn.Module):
    """u(σ), the logarithm of the loss to be expected at a noise level (Karras et al. 2024, EDM2, eq. 21).

    A matching loss w ‖·‖² becomes w e^(−u) ‖·‖² + u, whose best u makes every noise level count alike. A linear map of
    fixed random Fourier features, zero at first: training starts with the plain loss.

    Args:
        channels: number of features; EDM2 has 128.
    """

    def __init__(self, channels: int = 128):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))
        self.linear = nn.Linear(channels, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        """u, (B,) in float32 or wider, at ¼ ln σ, (B,)."""
        with torch.autocast(noise_level.device.type, enabled=False):
            features = math.sqrt(2) * torch.cos(noise_level[:, None] * self.frequencies + self.phases)
            return self.linear(features.to(self.linear.weight.dtype)).squeeze(1)


class CriticNetwork(nn.Module):
    """A critic that gives its prediction and, in the same forward, logits of real against generated.

    Args:
        network: gives its prediction and hidden tokens (B, N, D) (see `NetworkView`).
        kind: None (no logits), `encoder` or `head`.
        log_variance: whether it learns the size of its loss too (see `LogVariance`); its times must be ¼ ln σ.
    """

    def __init__(self, network: nn.Module, kind: str | None = None, log_variance: bool = False):
        super().__init__()
        self.network = network
        self.kind = kind
        width = 0 if kind is None else view_network(network).feature_width
        # Two layers on each token, averaged: DMD2's head is a few convolutions on a UNet's bottleneck.
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) if kind == "head" else None
        self.log_variance = LogVariance() if log_variance else None

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None,
        return_dict: bool = False,
        augment_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The prediction (B, …), logits (B, N) or None without an adversarial term, and u (B,) or None."""
        view = view_network(self.network)
        told = {"augment_labels": augment_labels} if augment_labels is not None else {}
        told |= {"condition": condition} if condition is not None else {}
        log_variance = None if self.log_variance is None else self.log_variance(t)
        if self.kind is None:
            return view(x_t, t, class_labels, **told)[0], None, log_variance
        prediction, features = view(x_t, t, class_labels, return_features=True, **told)
        logits = features.float().mean(-1) if self.head is None else self.head(features).squeeze(-1).float()
        return prediction, logits, log_variance
