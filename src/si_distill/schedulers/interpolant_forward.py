"""The forward half of the scheduler: x_t of given data, and the conventions of the network that is given it.

It imports only torch: a copy travels next to the scheduler into every saved pipeline.
"""

import torch


class InterpolantForwardMixin:
    """Needs an `interpolant`, and a `config` that says what the network predicts and which times it is given."""

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """
        What the network is given for the state `sample` at `timestep`: the state itself, scaled to unit variance for
        `prediction_type="edm"` (see `Interpolant.network_input`). `step` takes the state, not this.

        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): x_t.
            timestep: the time, a number or shape () or (B,); may be left out where nothing is scaled.
        """
        if timestep is None:
            if self.config.prediction_type == "edm":
                raise ValueError(
                    "`scale_model_input` was given no `timestep`, and an edm prediction's scale depends on it."
                )
            return sample
        t = torch.as_tensor(timestep, device=sample.device)
        return self.interpolant.network_input(sample, t, self.config.prediction_type)

    def network_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """What the network is given for the times `timestep`, in their shape (see `Interpolant.network_time`)."""
        times = self.interpolant.network_time(timestep, self.config.timestep_type)
        times = 1 - times if self.config.reversed_time else times
        return times if self.config.timestep_scale == 1 else self.config.timestep_scale * times

    def signed(self, model_output: torch.Tensor) -> torch.Tensor:
        """The network's output as a prediction of `prediction_type`: with the other sign if `prediction_sign` is -1."""
        return model_output if self.config.prediction_sign == 1 else -model_output

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_t of data `original_samples` at times (B,) in [0, 1]: α x0 + β x1 with noise x1, or α x0 + β x1 + γ z with noise
        z and the `reference` x1 of a bridge.
        """
        return self.interpolant.interpolate(original_samples, *self._ends_of(noise, timesteps, reference))

    def scale_noise(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        noise: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`add_noise` with the argument order of the flow-matching schedulers."""
        if noise is None:
            raise ValueError("`scale_noise` needs the noise.")
        return self.add_noise(sample, noise, timestep, reference)

    def get_velocity(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """İ_t = α' x0 + β' x1 (+ γ' z on a bridge), the target of a velocity network; arguments as `add_noise`."""
        return self.interpolant.velocity(sample, *self._ends_of(noise, timesteps, reference))

    def _ends_of(self, noise, timesteps, reference) -> tuple[torch.Tensor | None, ...]:
        """(x1, t, z)."""
        if self.interpolant.gaussian_reference:
            return noise, timesteps, None
        if reference is None:
            raise ValueError("On a bridge `noise` is z: pass the `reference` x1 too.")
        return reference, timesteps, noise
