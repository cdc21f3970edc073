"""Training of a multi-step teacher: regression of the interpolant's velocity, sample or noise."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

from ..data import load_training_data
from ..data.batches import Batch
from ..data.latents.dataset import LatentDataset
from ..errors import InputError
from ..pipelines import Condition, Field, InterpolantPipeline, view_network
from ..pipelines.interpolant_pipeline_network import view_class
from ..sample_noise import sample_seed
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from ..visualization import image_grid, tensor_to_pil
from .averaging.ema import Averages
from .build_network import DEFAULT_CLASS, build_network, own_class, with_inputs
from .config import TeacherConfig
from .loss_weights import regression_weight
from .optimizers import OptimizerSettings
from .run.facts import describe_data, describe_network
from .times import TimeSampler
from .trained_network import TrainedNetwork
from .trainer import Trainer

SAMPLE_STEPS = 20


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher's training before its first image.

    Args:
        network: randomly initialised.
        scheduler: its path, what it predicts and which times it is given.
        times: the distribution of the training times.
    """

    network: ModelMixin
    scheduler: StochasticInterpolantScheduler
    times: TimeSampler


def plan_teacher(settings: TeacherConfig, device: str = "cpu", **shape: int) -> TeacherPlan:
    """Resolves and checks everything but the images.

    Args:
        settings: of the training.
        device: where the network is built.
        shape: `sample_size`, `in_channels` and `num_classes` of the images.

    Raises:
        InputError: for what cannot work.
    """
    arguments, classes = dict(settings.model), own_class(settings)
    if settings.model_class:
        arguments["class"] = settings.model_class
    classes_name = view_class(classes.get(str(arguments.get("class", DEFAULT_CLASS)), ModelMixin)).classes_name
    for name, value in shape.items():
        if name == "num_classes" != classes_name:
            name, value = classes_name, value or None  # diffusers' word for unconditional
        unconditional = name == classes_name and not arguments.get(name, True)  # on labelled images too
        if arguments.setdefault(name, value) != value and not unconditional:
            raise InputError(f"`model.{name}` is {arguments[name]}, but the data set has {value}.")
    interpolant = settings.build_interpolant()
    scheduler = StochasticInterpolantScheduler(
        interpolant=settings.interpolant,
        interpolant_kwargs=interpolant.config,
        prediction_type=settings.prediction_type,
        init_time=interpolant.start_time(settings.prediction_type, settings.timestep_type),
        timestep_type=settings.timestep_type,
    )
    times = settings.build_time_sampler(interpolant, settings.timestep_type)
    with torch.device(device):
        network = build_network(with_inputs(arguments, settings), "model", classes)
    return TeacherPlan(network, scheduler, times)


class TeacherTrainer(Trainer):
    """Minimises E‖network(x_t, t, y) − target‖² on an interpolant (Ma et al. 2024, SiT, eq. 5), with label dropout.

    Of paired data the network sees each image's own reference next to x_t; on a bridge the reference is x1.
    """

    settings: TeacherConfig
    losses = ("loss",)

    def setup(self) -> None:
        settings = self.settings
        self.data = load_training_data(settings.data, self.readers, settings.model.get("num_classes"))
        self.vae, self.vae_pixel_min = self._load_vae()
        shape = {"in_channels": self.data.channels, "num_classes": len(self.data.class_names)}
        plan = plan_teacher(settings, sample_size=self.data.size, **shape)
        network, self.scheduler, self.time_sampler = plan.network, plan.scheduler, plan.times
        self.interpolant = self.scheduler.interpolant
        self.dropout_prob = network.config.get("class_dropout_prob", 0.0)  # of a class that has a null class
        self.class_names = self.data.class_names if view_network(network).num_classes else []
        self.train_network(network)

    def train_network(self, network: nn.Module) -> None:
        """Makes `trained` and `averages` of a network."""
        settings = self.settings
        self.averages = Averages(network, settings, self.global_batch_size)
        self.trained = TrainedNetwork(
            self.accelerator, network, settings, OptimizerSettings.of(vars(settings), total_updates=settings.max_steps)
        )
        self.averages.prepare(self.accelerator)

    def _load_vae(self) -> tuple[ModelMixin | None, float]:
        """The autoencoder of latents, and the darkest of its pixels."""
        if not isinstance(self.data, LatentDataset):
            return None, -1.0
        if self.settings.augment_prob > 0:
            raise InputError(
                f"`augment_prob` is {self.settings.augment_prob}, but {self.settings.data.name} holds latents, which cannot "
                "be flipped or moved: set it to 0."
            )
        vae = self.data.load_vae().requires_grad_(False).eval()
        return vae.to(self.accelerator.device), self.data.scaling.pixel_min

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        settings, trained = self.settings, self.trained
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in range(settings.gradient_accumulation_steps):
            batch = self.next_batch(self.data, micro_batch)
            x0, network, indices = self.samples(batch), view_network(trained.module), self.indices(micro_batch)
            condition = self.condition(batch)
            if network.null is not None:
                dropped = self.noise.uniform("labels", self.step, indices=indices) < self.dropout_prob
                condition = condition.nulled(network.null, dropped)
            augmentation = self.augmentation(indices)
            if augmentation is not None:
                x0, condition = augmentation(x0), replace(condition, augment=augmentation.labels)
            u, noise = self.noise.uniform_and_normal(x0.shape[1:], "teacher", self.step, indices=indices)
            t = self.time_sampler(u)
            x1, z = (noise, None) if self.interpolant.gaussian_reference else (batch["reference"], noise)
            x_t = self.interpolant.interpolate(x0, x1, t, z)
            target = self.interpolant.target(x0, x1, t, self.scheduler.config.prediction_type, z)
            with trained.training(), trained.forward_context(micro_batch):
                with self.accelerator.autocast():
                    prediction = Field(network, self.scheduler).predict(x_t, t, condition)
                weight = regression_weight(
                    settings.loss_weight, self.interpolant.at(t, target), self.scheduler.config.prediction_type
                )
                loss = (weight * (prediction - target).square()).mean()
                trained.backward(loss)
            total += loss.detach() / settings.gradient_accumulation_steps
        norm, applied = trained.update()
        self.averages.update(trained.unwrapped, self.step)
        return {"loss": total, "grad_norm": norm}, applied

    def samples(self, batch: Batch) -> torch.Tensor:
        """What the network learns to make of a batch, (B, C, H, W)."""
        return batch["images"]

    def condition(self, batch: Batch) -> Condition:
        """What the network is told of a batch."""
        image = view_network(self.trained.module).condition_image(batch.get("reference"))
        return Condition(batch["labels"], image=image)

    @property
    def networks(self) -> dict[str, TrainedNetwork]:
        return {"": self.trained}

    def pipeline(self, network: nn.Module | None = None) -> InterpolantPipeline:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        network = self.averages.network if network is None else network
        degradation = self.settings.data.build_degradation()
        return InterpolantPipeline(
            network,
            scheduler,
            vae=self.vae,
            id2label=dict(enumerate(self.class_names)) or None,
            vae_pixel_min=self.vae_pixel_min,
            image_upsampling=degradation and degradation.image_upsampling,
        )

    def sample_grid(self) -> Image.Image:
        count, pipeline = 10, self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        given: dict[str, Any] = {}
        if pipeline.noise_shape is not None:
            given["latents"] = self.noise.normal(pipeline.noise_shape, "samples", indices=range(count))
        labels, above, below = [n % max(1, len(self.class_names)) for n in range(count)], {}, {}
        if pipeline.image_channels:
            batch = self.shown_batch(self.data, count)
            given["image"], labels = batch["reference"], batch["labels"].tolist()
            above, below = {"input": given["image"]}, {"truth": batch["images"]} if self.settings.data.is_paired else {}
            given["generator"] = [
                torch.Generator().manual_seed(sample_seed(self.settings.seed, "samples", n)) for n in range(count)
            ]
        elif not self.class_names:
            given["batch_size"] = count
        if self.class_names:
            given["class_labels"] = labels
        with self.accelerator.autocast():
            images = pipeline(**given, num_inference_steps=SAMPLE_STEPS).images
        rows = {
            **{name: tensor_to_pil(shown) for name, shown in above.items()},
            f"{SAMPLE_STEPS} steps": images,
            **{name: tensor_to_pil(shown) for name, shown in below.items()},
        }
        return image_grid(
            list(rows.values()), list(rows), [self.class_names[n] for n in labels] if self.class_names else None
        )

    def facts(self) -> dict[str, Any]:
        return {
            "network": describe_network(self.averages.network),
            "data": describe_data(self.settings.data, self.data),
        }
