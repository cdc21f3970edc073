"""Laws of the training times, as maps from a uniform number to a time: the noise source stays with the caller."""

from dataclasses import dataclass

import torch

TIME_SAMPLERS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class TimeSampler:
    """t in [t_min, t_max] from u ~ U(0, 1).

    Args:
        name: `uniform`, or `logit_normal`: logit(t) ~ N(mean, std²) restricted to [t_min, t_max] (Esser et al. 2024,
            "Scaling Rectified Flow Transformers", section 3.1).
        t_min, t_max: ends of the times.
        mean, std: of logit(t).
    """

    name: str = "uniform"
    t_min: float = 0.0
    t_max: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) in [0, 1) to times (B,) in the dtype of u; computed in float64."""
        precise = u.double()
        if self.name == "uniform":
            return (self.t_min + (self.t_max - self.t_min) * precise).to(u.dtype)
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device=u.device)
        low, high = torch.special.ndtr((torch.logit(ends) - self.mean) / self.std)
        normal = torch.special.ndtri((low + (high - low) * precise).clamp(1e-12, 1 - 1e-12))
        return torch.sigmoid(self.mean + self.std * normal).clamp(self.t_min, self.t_max).to(u.dtype)
