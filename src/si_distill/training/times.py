"""Distributions of the training times, as maps from a uniform number to a time: the noise source stays with the caller."""

import functools
import math
from dataclasses import dataclass

import torch

from ..choices import TIME_SAMPLERS
from ..interpolants import EDMInterpolant, Interpolant


@dataclass(frozen=True)
class TimeSampler:
    """t in [t_min, t_max] from u ~ U(0, 1), monotonically.

    * `uniform`;
    * `logit_normal`: logit(t) ~ N(mean, std²) restricted to [t_min, t_max] (Esser et al. 2024, "Scaling Rectified Flow
      Transformers", section 3.1);
    * `lognormal`: σ = β/α with ln σ ~ N(mean, std²) restricted to [t_min, t_max] (Karras et al. 2022, table 1: -1.2 and
      1.2 for pixels; 2024, "EDM2": -0.4 and 1.0 for latents);
    * `karras`: σ = β/α at a time of EDM's map that is uniform in [t_min, t_max] (the generator's times of SiD: 0 and 0.8),
      and in what the interpolant reaches. On `edm` it is `uniform`; elsewhere t_min and t_max are times of EDM's map, not
      of the interpolant, with its σ from 0.002 to 80 and ρ = 7.

    Args:
        name: of the distribution.
        t_min, t_max: ends of the times.
        mean, std: of logit(t) or ln σ.
        interpolant: needed by `lognormal`, `karras` and discrete timesteps.
        steps: `uniform` times are drawn from this many equally spaced ones of [0, 1], ends included (DMD2: 1,000 of EDM's
            map); None is all times.
        timestep_type: what the network is given for a time; with `discrete` times are moved to its nearest step, by at most
            half of one.

    Raises:
        ValueError: for an unknown distribution, one without its interpolant, an empty interval of times, or times that the
            network cannot be given.
    """

    name: str = "uniform"
    t_min: float = 0.0
    t_max: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    interpolant: Interpolant | None = None
    timestep_type: str = "time"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in TIME_SAMPLERS:
            raise ValueError(f"Unknown distribution of times {self.name!r}. Choose one of: {', '.join(TIME_SAMPLERS)}.")
        if self.steps is not None:
            if self.name != "uniform":
                raise ValueError(
                    f"Times from {self.steps} steps are uniform ones, and the distribution is {self.name!r}."
                )
            first, last = self._grid()
            if first > last:
                raise ValueError(
                    f"None of the {self.steps} steps lies in [{self.t_min}, {self.t_max}]: widen the times."
                )
        if self.timestep_type != "time" and self.interpolant is None:
            raise ValueError(f"timestep_type={self.timestep_type!r} needs the interpolant.")
        if self.name in ("lognormal", "karras"):
            if self.interpolant is None:
                raise ValueError(f"The distribution {self.name!r} is one of noise levels and needs the interpolant.")
            if not self.interpolant.gaussian_reference:
                raise ValueError(
                    f"The distribution of times {self.name!r} is one of noise levels, which the interpolant "
                    f"{self.interpolant.name!r} does not have: use uniform or logit_normal."
                )
            low, high = self._ends(torch.device("cpu")).tolist()
            if not low < high:
                raise ValueError(
                    f"The distribution {self.name!r} has no times between t_min={self.t_min} and t_max={self.t_max} on the "
                    f"interpolant {self.interpolant.name!r}: widen them, or choose another mean."
                )
        if self.timestep_type != "time":
            ends = self._continuous(torch.tensor([0.0, 1.0], dtype=torch.float64))
            self.interpolant.network_time(ends, self.timestep_type)  # the network can be told both

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """u (B,) in [0, 1) to times (B,) in the dtype of u; computed in float64."""
        t = self._continuous(u)
        return t if self.timestep_type == "time" else self.interpolant.nearest_time(t, self.timestep_type)

    def _continuous(self, u: torch.Tensor) -> torch.Tensor:
        if self.steps is not None:
            first, last = self._grid()
            number = (first + ((last - first + 1) * u.double()).floor()).clamp(max=last)
            return (number / (self.steps - 1)).to(u.dtype)
        if self.name == "uniform":
            return (self.t_min + (self.t_max - self.t_min) * u.double()).to(u.dtype)
        low, high = self._ends(u.device)
        share = low + (high - low) * u.double()
        if self.name == "karras":
            karras = self._karras()
            if karras == self.interpolant:
                return share.to(u.dtype)
            return self.interpolant.times_of_ratios(karras.coefficients(share).beta).to(u.dtype)
        value = self.mean + self.std * torch.special.ndtri(share.clamp(1e-12, 1 - 1e-12))
        if self.name == "logit_normal":
            return torch.sigmoid(value).clamp(self.t_min, self.t_max).to(u.dtype)
        # The clamp of the share may have left the interval; σ must stay within what the interpolant reaches.
        sigma = torch.minimum(torch.maximum(value.exp(), self._ratio(self.t_min, u)), self._ratio(self.t_max, u))
        return self.interpolant.times_of_ratios(sigma).clamp(self.t_min, self.t_max).to(u.dtype)

    def _grid(self) -> tuple[int, int]:
        """The first and the last step in [t_min, t_max]; ends that are steps up to rounding belong to it."""
        return math.ceil(self.t_min * (self.steps - 1) - 1e-6), math.floor(self.t_max * (self.steps - 1) + 1e-6)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - samplers live as long as their training
    @torch.inference_mode(False)
    def _ends(self, device: torch.device) -> torch.Tensor:
        """Values of the distribution's own uniform variable at t_min and t_max: of the normal's CDF, or of the
        times of EDM's map.
        """
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device=device)
        if self.name == "karras":
            karras = self._karras()
            if karras == self.interpolant:
                return ends
            reach = torch.stack([self._ratio(t, ends) for t in (0.0, 1.0)])
            reached = karras.times_of_ratios(reach.clamp(karras.sigma_min, karras.sigma_max))
            return torch.stack([torch.maximum(ends[0], reached[0]), torch.minimum(ends[1], reached[1])])
        value = (
            torch.logit(ends)
            if self.name == "logit_normal"
            else torch.stack([self._ratio(t, ends) for t in (self.t_min, self.t_max)]).log()
        )
        return torch.special.ndtr((value - self.mean) / self.std)

    def _ratio(self, t: float, like: torch.Tensor) -> torch.Tensor:
        """β/α at t, float64, on the device of `like`."""
        c = self.interpolant.coefficients(torch.tensor(t, dtype=torch.float64, device=like.device))
        return c.beta / c.alpha

    def _karras(self) -> EDMInterpolant:
        """The interpolant itself where it is EDM's map, else the map of Karras et al. 2022."""
        return self.interpolant if isinstance(self.interpolant, EDMInterpolant) else EDMInterpolant()
