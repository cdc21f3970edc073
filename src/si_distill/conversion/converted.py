"""What every converter gives: a network of ours, its scheduler, and what a person wants to know about them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


@dataclass
class Converted:
    """
    A converted checkpoint, not yet written.

    Args:
        kind: what it was, in readable form.
        transformer: the network by the contract of this library.
        scheduler: path, prediction and time of the network.
        student: whether it is a one-step student, or a teacher.
        place: where in the file the weights were; empty if the file is nothing else.
        preset: name of its published size, if it has one.
        ignored: tensors of the file that the network has no use for.
        vae: the autoencoder that came along.
        vae_config: what an autoencoder's config has to say about the network's latents.
        vae_pixel_min: the darkest pixel of the images that the autoencoder was used with.
        id2label: the names of classes that came along.
        log_variance: `freqs`, `phases` and `weight` of an EDM2 teacher's log-variance, for a critic to start from.
    """

    kind: str
    transformer: ModelMixin
    scheduler: StochasticInterpolantScheduler
    student: bool = False
    place: str = ""
    preset: str | None = None
    ignored: list[str] = field(default_factory=list)
    vae: ModelMixin | None = None
    vae_config: dict[str, Any] = field(default_factory=dict)
    vae_pixel_min: float = -1.0
    id2label: dict[int, str] | None = None
    log_variance: dict[str, torch.Tensor] | None = None

    def pipeline(self) -> InterpolantPipeline | OneStepInterpolantPipeline:
        """All of it as a pipeline."""
        if self.vae is not None:
            self.vae.register_to_config(**self.vae_config)
        cls = OneStepInterpolantPipeline if self.student else InterpolantPipeline
        return cls(self.transformer, self.scheduler, self.vae, self.id2label, self.vae_pixel_min)
