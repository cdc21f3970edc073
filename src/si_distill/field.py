"""A teacher or critic of any parameterisation, seen as one field."""

from collections.abc import Callable

import torch

from .interpolants import Interpolant
from .pipelines.interpolant_pipeline_network import guided_outputs, network_condition


class Field:
    """A network's prediction at (x_t, t, y) in whatever space is asked for.

    Args:
        network: called as `network(network_input, timestep, class_labels, return_dict=False)` with x_t, scaled if the
            prediction is `edm` (see `Interpolant.network_input`), or as diffusers' own classes are (see `NetworkView`); the
            result's first element is the prediction, a second one are the logits of an adversarial term.
        interpolant: the path on which the network was trained.
        prediction_type: what it predicts: one of `si_distill.interpolants.PREDICTIONS`.
        null_class: label for "no class"; needed when `guidance_scale` is not 1.
        guidance_scale: classifier-free guidance w in v_∅ + w (v_y − v_∅), in one batched forward; 1 is none.
        guidance_interval: times [low, high] with guidance (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited
            Interval"); outside w is 1. Times all over [0, 1] when not given.
        timestep_type: what number the network is given for a time (see `Interpolant.network_time`).
        guidance_channels: guides only the first channels of the prediction; None is all of them.
    """

    def __init__(
        self,
        network: Callable[..., tuple[torch.Tensor, ...]],
        interpolant: Interpolant,
        prediction_type: str,
        null_class: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        timestep_type: str = "time",
        guidance_channels: int | None = None,
    ):
        self.network = network
        self.interpolant = interpolant
        self.prediction_type = prediction_type
        self.null_class = null_class
        self.guidance_scale = guidance_scale
        self.guidance_interval = guidance_interval
        self.timestep_type = timestep_type
        self.guidance_channels = guidance_channels

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        space: str,
        augment_labels: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction in `space`, in the dtype of `x_t` (networks may run in bfloat16, losses do not).

        Args:
            x_t: (B, …).
            t: (B,) times in [0, 1].
            labels: (B,) classes; an unconditional network ignores them.
            space: one of `si_distill.interpolants.PREDICTIONS`.
            augment_labels: (B, L) what augmentation did to the images behind x_t; None is nothing.
            reference: (B, …) the image that the network sees beside x_t; on a bridge the pair's x1.
        """
        prediction = self.outputs(x_t, t, labels, augment_labels, reference)[0]
        return self.interpolant.convert(prediction, x_t, t, self.prediction_type, space, x1=reference)

    def sample(
        self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x̂0, or where a bridge's prediction does not determine it Euler's step to t = 0 (`Interpolant.last_step`)."""
        prediction = self.predict(x_t, t, labels, reference)
        return self.interpolant.last_step(prediction, x_t, t, self.prediction_type, x1=reference)

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The network's own prediction, guided, in the dtype of `x_t`."""
        return self.outputs(x_t, t, labels, reference=reference)[0]

    def outputs(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The network's outputs of one forward: the guided prediction in the dtype of `x_t`, and what else it gives."""
        network_input = self.interpolant.network_input(x_t, t, self.prediction_type)
        return self._forward(network_input, t, labels, augment_labels, reference)

    def _forward(
        self,
        network_input: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        low, high = self.guidance_interval
        scale: float | torch.Tensor = self.guidance_scale
        if scale != 1 and (low > 0 or high < 1):
            scale = torch.where((t >= low) & (t <= high), scale, 1.0)
        timestep = self.interpolant.network_time(t, self.timestep_type)
        prediction, *others = guided_outputs(
            self.network,
            network_input,
            timestep,
            labels,
            self.null_class,
            scale,
            augment_labels,
            self.guidance_channels,
            condition,
        )
        return prediction.to(network_input.dtype), *others

    def one_step(
        self,
        noise: torch.Tensor | None,
        t: float,
        labels: torch.Tensor | None,
        reference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The one-step generator G (see `Interpolant.one_step`): x̂0(β(t) x1, t), where x1 is the noise or, on a bridge, the
        reference.

        Args:
            noise: standard normal. With a Gaussian reference it is x1, (B, …); on a bridge it is what makes the map random,
                (B, noise_channels, …), seen beside x1, or None for a deterministic map.
            t: the time of the map.
            labels: (B,) classes.
            reference: (B, …) the image that the network sees; on a bridge x1.
        """
        gaussian = self.interpolant.gaussian_reference
        condition = network_condition(self.network, reference, None if gaussian else noise)
        return self.interpolant.one_step(
            lambda network_input, times: self._forward(network_input, times, labels, condition=condition)[0],
            noise if gaussian else reference,
            t,
            self.prediction_type,
        )
