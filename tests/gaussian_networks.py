"""A teacher that is exact: the best network for Gaussian data, as a Diffusers model."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from gaussian_oracle import Gaussian

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler


class GaussianNetwork(ModelMixin, ConfigMixin):
    """The velocity of independent pixels N(mean + class, std²) on the path of `scheduler_config`; the null class has 0."""

    @register_to_config
    def __init__(self, mean=0.0, std=1.0, in_channels=1, sample_size=2, num_classes=3, scheduler_config=None):
        super().__init__()
        self.null_class = num_classes
        self.interpolant = StochasticInterpolantScheduler.from_config(scheduler_config or {}).interpolant
        self.scale = torch.nn.Parameter(torch.ones(()))  # for a device and a dtype

    def law(self, labels):
        labels = torch.where(labels == self.null_class, 0, labels)
        return Gaussian(self.config.mean + labels.to(self.dtype).reshape(-1, 1, 1, 1), torch.full((), self.config.std))

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        velocity = self.law(class_labels).velocity(self.interpolant, hidden_states, timestep)
        return (self.scale * velocity,)


def gaussian_teacher(mean=0.0, std=1.0, **scheduler) -> InterpolantPipeline:
    sched = StochasticInterpolantScheduler(**scheduler)
    pipe = InterpolantPipeline(GaussianNetwork(mean, std, scheduler_config=dict(sched.config)), sched)
    pipe.set_progress_bar_config(disable=True)
    return pipe
