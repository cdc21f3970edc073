"""A teacher or critic of any parameterisation, seen as one field."""

from collections.abc import Callable

import torch

from .interpolants import Interpolant
from .pipelines.interpolant_pipeline_base import guided_prediction


class Field:
    """A network's prediction at (x_t, t, y) in whatever space is asked for.

    Args:
        network: called as `network(x_t, t, class_labels, return_dict=False)`; the result's first element is used.
        interpolant: the path on which the network was trained.
        prediction_type: what it predicts: `velocity`, `sample`, `epsilon` or `score`.
        null_class: label for "no class"; needed when `guidance_scale` is not 1.
        guidance_scale: classifier-free guidance w in v_∅ + w (v_y − v_∅), in one batched forward; 1 is none.
    """

    def __init__(
        self,
        network: Callable[..., tuple[torch.Tensor, ...]],
        interpolant: Interpolant,
        prediction_type: str,
        null_class: int | None = None,
        guidance_scale: float = 1.0,
    ):
        self.network = network
        self.interpolant = interpolant
        self.prediction_type = prediction_type
        self.null_class = null_class
        self.guidance_scale = guidance_scale

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, space: str) -> torch.Tensor:
        """The prediction in `space`, in the dtype of `x_t` (networks may run in bfloat16, losses do not).

        Args:
            x_t: (B, …).
            t: (B,) times in [0, 1].
            labels: (B,) classes.
            space: `velocity`, `sample`, `epsilon` or `score`.
        """
        return self.interpolant.convert(self.predict(x_t, t, labels), x_t, t, self.prediction_type, space)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The network's own prediction, guided, in the dtype of `x_t`."""
        prediction = guided_prediction(self.network, x_t, t, labels, self.null_class, self.guidance_scale)
        return prediction.to(x_t.dtype)

    def one_step(self, noise: torch.Tensor, t: float, labels: torch.Tensor) -> torch.Tensor:
        """The one-step generator G(x1) = x̂0(β(t) x1, t) (see `Interpolant.one_step`)."""
        return self.interpolant.one_step(
            lambda x_t, times: self.predict(x_t, times, labels), noise, t, self.prediction_type
        )
