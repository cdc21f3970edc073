"""Training of a multi-step teacher: regression of the interpolant's velocity, sample or noise."""

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

from ..data import load_images
from ..errors import InputError
from ..pipelines import InterpolantPipeline
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from ..visualization import image_grid
from .config import TeacherConfig
from .ema import Averages
from .loss_weights import regression_weight
from .network_settings import build_network, with_augmentation
from .networks import TrainedNetwork
from .run_facts import describe_data, describe_network
from .trainer import Trainer

SAMPLE_STEPS = 20


class TeacherTrainer(Trainer):
    """Minimises E‖network(x_t, t, y) − target‖² on an interpolant (Ma et al. 2024, SiT, eq. 5), with label dropout."""

    settings: TeacherConfig
    losses = ("loss",)

    def setup(self) -> None:
        settings = self.settings
        self.interpolant = settings.build_interpolant()
        self.time_sampler = settings.build_time_sampler(self.interpolant, settings.timestep_type)
        self.data = load_images(settings.data)
        network = self._build_network()
        self.class_dropout_prob, self.null_class = network.config.class_dropout_prob, network.null_class
        self.class_names = self.data.class_names if network.config.num_classes else []
        self.averages = Averages(network, settings, self.global_batch_size)
        self.trained = TrainedNetwork(
            self.accelerator, network, settings, settings.learning_rate, total_updates=settings.max_steps
        )
        self.averages.prepare(self.accelerator)

    def _build_network(self) -> ModelMixin:
        arguments = dict(self.settings.model)
        for name, value in (
            ("sample_size", self.data.size),
            ("in_channels", self.data.channels),
            ("num_classes", len(self.data.class_names)),
        ):
            unconditional = name == "num_classes" and arguments.get(name) == 0  # on labelled images too
            if arguments.setdefault(name, value) != value and not unconditional:
                raise InputError(f"`model.{name}` is {arguments[name]}, but the data set has {value}.")
        return build_network(with_augmentation(arguments, self.settings), "model")

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        settings, trained = self.settings, self.trained
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in range(settings.gradient_accumulation_steps):
            batch = self.next_batch(self.data, micro_batch)
            x0, labels = batch["images"], batch["labels"]
            indices = self.indices(micro_batch)
            if self.null_class is not None:
                dropped = self.noise.uniform("labels", self.step, indices=indices) < self.class_dropout_prob
                labels = torch.where(dropped, self.null_class, labels)
            augmentation, told = self.augmentation(indices), {}
            if augmentation is not None:
                x0, told = augmentation(x0), {"augment_labels": augmentation.labels}
            u, x1 = self.noise.uniform_and_normal(x0.shape[1:], "teacher", self.step, indices=indices)
            t = self.time_sampler(u)
            x_t = self.interpolant.interpolate(x0, x1, t)
            target = self.interpolant.target(x0, x1, t, settings.prediction_type)
            with trained.forward_context(micro_batch):
                with self.accelerator.autocast():
                    network_input = self.interpolant.network_input(x_t, t, settings.prediction_type)
                    timestep = self.interpolant.network_time(t, settings.timestep_type)
                    prediction = trained.module(network_input, timestep, labels, return_dict=False, **told)[0]
                weight = regression_weight(
                    settings.loss_weight, self.interpolant.at(t, target), settings.prediction_type
                )
                loss = (weight * (prediction.float() - target).square()).mean()
                trained.backward(loss)
            total += loss.detach() / settings.gradient_accumulation_steps
        norm, applied = trained.update()
        self.averages.update(trained.unwrapped, self.step)
        return {"loss": total, "grad_norm": norm}, applied

    def learning_rates(self) -> dict[str, float]:
        return {"learning_rate": self.trained.learning_rate}

    def pipeline(self, network: nn.Module | None = None) -> InterpolantPipeline:
        scheduler = StochasticInterpolantScheduler(
            interpolant=self.settings.interpolant,
            interpolant_kwargs=self.interpolant.config,
            prediction_type=self.settings.prediction_type,
            init_time=self.interpolant.start_time(self.settings.prediction_type, self.settings.timestep_type),
            timestep_type=self.settings.timestep_type,
        )
        network = self.averages.network if network is None else network
        return InterpolantPipeline(network, scheduler, id2label=dict(enumerate(self.class_names)) or None)

    def sample_grid(self) -> Image.Image:
        count = 10
        shape = (self.data.channels, self.data.size, self.data.size)
        latents = self.noise.normal(shape, "samples", indices=range(count))
        labels = [n % len(self.class_names) for n in range(count)] if self.class_names else None
        batch_size = None if labels else count
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        with self.accelerator.autocast():
            images = pipeline(labels, num_inference_steps=SAMPLE_STEPS, latents=latents, batch_size=batch_size).images
        return image_grid([images], [f"{SAMPLE_STEPS} steps"], labels and [self.class_names[n] for n in labels])

    def facts(self) -> dict[str, Any]:
        return {
            "network": describe_network(self.averages.network),
            "data": describe_data(self.settings.data, self.data),
        }
