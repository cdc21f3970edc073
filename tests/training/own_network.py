"""A network of somebody's own, as small as they come: what `--model_class own_network:OwnNetwork` names in tests."""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config


class OwnNetwork(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, num_classes: int = 10, width: int = 8):
        super().__init__()
        self.time = torch.nn.Linear(1, width)
        self.label = torch.nn.Embedding(num_classes, width)
        self.enter = torch.nn.Conv2d(in_channels, width, 3, padding=1)
        self.leave = torch.nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        told = self.time(timestep[:, None]) + self.label(class_labels)
        output = self.leave(torch.relu(self.enter(sample) + told[..., None, None]))
        return {"sample": output} if return_dict else (output,)


class Plain(torch.nn.Linear):
    pass
