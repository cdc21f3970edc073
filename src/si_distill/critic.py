"""The critic: its network, and what else it gives in the same forward."""

import math

import torch
from torch import nn

from .log_variance import LogVariance
from .pipelines import Condition, view_network

#: Kernel, stride and padding of the strided convolutions of a head, by its name; `mlp` has none.
HEADS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "mlp": (),
    "dmd2": ((4, 2, 1), (4, 4, 0)),  # DMD2 main/edm/edm_guidance.py: 8 × 8 → 4 × 4 → 1 × 1; FastGen's is the same
    "realuid": ((2, 2, 0), (2, 2, 0)),  # RealUID src/models.py: 4 × 4 → 2 × 2 → 1 × 1
}
#: Groups of the normalisation in these heads (DMD2, RealUID), and the least channels of one: on the last map, of one pixel,
#: a group of one channel would be normalised to nothing.
HEAD_GROUPS, GROUP_CHANNELS = 32, 8


class ConvolutionalHead(nn.Module):
    """Strided convolutions with group normalisation and SiLU on a square feature map, then a 1 × 1 convolution to logits.

    Args:
        width: channels D of the features.
        size: height and width of the map.
        layers: kernel, stride and padding of each convolution.

    Raises:
        ValueError: when the map is too small for the convolutions.
    """

    def __init__(self, width: int, size: int, layers: tuple[tuple[int, int, int], ...]):
        super().__init__()
        modules, side = [], size
        for kernel, stride, padding in layers:
            side = (side + 2 * padding - kernel) // stride + 1
            groups = math.gcd(HEAD_GROUPS, max(1, width // GROUP_CHANNELS))
            modules += [nn.Conv2d(width, width, kernel, stride, padding), nn.GroupNorm(groups, width), nn.SiLU()]
        if side < 1:
            raise ValueError(
                f"its convolutions need a larger map than the {size} × {size} of the network's middle features. Set "
                "`adversarial.head` to mlp."
            )
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, M) of features (B, N, D)."""
        side = math.isqrt(features.shape[1])
        return self.layers(features.mT.unflatten(2, (side, side))).flatten(1)


def _build_head(name: str, network: nn.Module) -> nn.Module:
    view = view_network(network)
    if HEADS[name]:
        return ConvolutionalHead(view.feature_width, view.feature_size, HEADS[name])
    # Two layers on each token, averaged.
    width = view.feature_width
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten())


class CriticNetwork(nn.Module):
    """A critic that gives its prediction and, in the same forward, logits of real against generated images.

    Args:
        network: gives its prediction and hidden tokens (B, N, D) (see `NetworkView`).
        kind: None (no logits), `encoder` or `head`.
        head: one of `HEADS`, for kind `head`.
        log_variance: the size of its loss, or None; the network's times must then be ¼ ln σ.
        own_features: whether logits are those of its own features; otherwise only `judge` gives any.

    Raises:
        ValueError: when the network gives no features, or the head does not fit them.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: str | None = None,
        head: str = "mlp",
        log_variance: LogVariance | None = None,
        own_features: bool = True,
    ):
        super().__init__()
        self.network = network
        self.kind = kind
        self.own_features = own_features and kind is not None
        if self.own_features:
            view_network(network).feature_width  # noqa: B018 - raises for a network without features
        self.head = _build_head(head, network) if kind == "head" else None
        self.log_variance = log_variance

    def forward(
        self,
        network_input: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        condition: Condition | None = None,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | torch.Tensor:
        """The prediction (B, …), logits (B, M) or None without an adversarial term, and u (B,) or None.

        With `features` (B, N, D) of another network, the logits of these alone: through `forward`, so that wrappers for
        distributed training see it.
        """
        if features is not None:
            return self._logits(features)
        outputs = view_network(self.network)(network_input, timesteps, condition, return_features=self.own_features)
        logits = self._logits(outputs[1]) if self.own_features else None
        return outputs[0], logits, None if self.log_variance is None else self.log_variance(timesteps)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        logits = self.head(features) if self.head is not None else features
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.mean(-1) if self.head is None else logits


class FeatureNetwork(nn.Module):
    """A frozen network that gives its features after its prediction in each forward, for a head that reads them.

    Args:
        network: gives hidden tokens (see `NetworkView`).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, network_input, timesteps, condition) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction (B, …) and the features (B, N, D)."""
        return view_network(self.network)(network_input, timesteps, condition, return_features=True)
