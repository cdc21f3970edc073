"""u(σ), the logarithm of the loss to be expected at a noise level: the module, and what a teacher's folder keeps of it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .errors import InputError
from .models.unet_edm2 import MPConv, MPFourier

#: In the folder of a converted EDM2 teacher: the log-variance of its checkpoint, which no prediction needs.
LOG_VARIANCE = "log_variance.safetensors"


class LogVariance(nn.Module):
    """u(σ) (Karras et al. 2024, EDM2, eq. 21).

    A matching loss w ‖·‖² becomes w e^(−u) ‖·‖² + u, whose best u makes every noise level count alike. A linear map of
    fixed random Fourier features. From an EDM2 checkpoint its weight vector has unit norm, as there; without one it starts
    at zero, so that training starts with the plain loss.

    Args:
        weights: `freqs` (K,), `phases` (K,) and `weight` (1, K) of a checkpoint, or None.
        channels: number K of features without a checkpoint; EDM2 has 128.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor] | None = None, channels: int = 128):
        super().__init__()
        channels = channels if weights is None else len(weights["freqs"])
        self.fourier = MPFourier(channels)
        if weights is None:
            self.linear = nn.Linear(channels, 1, bias=False)
            nn.init.zeros_(self.linear.weight)
        else:
            self.linear = MPConv(channels, 1)
            for target, name in (
                (self.fourier.freqs, "freqs"),
                (self.fourier.phases, "phases"),
                (self.linear.weight.data, "weight"),
            ):
                target.copy_(weights[name])

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        """u, (B,) in float32 or wider, at ¼ ln σ, (B,)."""
        with torch.autocast(noise_level.device.type, enabled=False):
            return self.linear(self.fourier(noise_level).to(self.linear.weight.dtype)).squeeze(1)


def load_log_variance(name: str) -> dict[str, torch.Tensor] | None:
    """What a converted EDM2 teacher keeps of its checkpoint's log-variance u(σ): `freqs`, `phases`, `weight`; else None.

    Args:
        name: the teacher's folder or Hub id.

    Raises:
        InputError: when the file is there and cannot be read.
    """
    path = Path(name) / LOG_VARIANCE
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, LOG_VARIANCE))
        except (EntryNotFoundError, HFValidationError):
            return None
        except OSError as error:
            raise InputError(f"Cannot load {LOG_VARIANCE} of the teacher {name!r}: {error}") from error
    if not path.is_file():
        return None
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if set(weights) != {"freqs", "phases", "weight"}:
        raise InputError(f"{path} must hold freqs, phases and weight, but it holds {', '.join(sorted(weights))}.")
    return weights
