"""The game of three networks: a frozen teacher, a critic that follows the student, and a one-step student."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..critic import CriticNetwork
from ..data.batches import Batch
from ..pipelines import OneStepInterpolantPipeline
from ..velocity import Field
from ..visualization import image_grid
from .blocks import keep_in_bfloat16, prepare_blocks
from .config import DistillConfig
from .distillation_inputs import (
    check_log_variance,
    class_shares,
    fitting_objective,
    load_fitting_images,
    load_teacher,
    starting_critic,
    starting_student,
)
from .distillation_losses import DistillationLosses, Draw, Images
from .distillation_references import reference_roles
from .ema import Averages
from .health import HealthMonitor
from .networks import TrainedNetwork
from .run_facts import describe_data, describe_network, describe_teacher
from .sharding import shard
from .trainer import Trainer

#: Images in a row of a sample grid.
GRID_COLUMNS = 10


@dataclass
class MicroBatch:
    """What the critic and the generator share in one iteration.

    Args:
        labels: (B,) classes of the generated images.
        data: `images`, `labels` and `reference` as the recipe needs them; empty when it needs none.
        indices: places in the global batch.
    """

    labels: torch.Tensor
    data: Batch
    indices: range


class DistillationTrainer(Trainer):
    """Critic updates and generator updates on one member of the objective family (see `si_distill.objectives`).

    One iteration is `critic_steps` critic updates and `generator_steps` generator updates. All critic updates and the
    first generator update share ONE generator forward; x_t is built from a generated sample with fresh (t, x1) each time.
    An adversarial term looks at the critic's features in the same forward.
    """

    settings: DistillConfig
    losses = ("generator_loss", "critic_loss")

    def setup(self) -> None:
        settings = self.settings
        self.teacher_pipeline = teacher = load_teacher(settings)
        self.interpolant = teacher.scheduler.interpolant
        self.prediction_type = teacher.scheduler.config.prediction_type
        self.timestep_type = teacher.scheduler.config.timestep_type
        settings.check_times(self.interpolant)
        self.objective = fitting_objective(settings, teacher)
        self.adversarial = settings.adversarial.build()
        view = teacher.network
        self.null_class, self.num_classes, self.sample_shape = view.null_class, view.num_classes, view.sample_shape
        values = math.prod(self.sample_shape)
        self.references = reference_roles(settings, teacher)
        needs_data = self.objective.uses_real_data or self.adversarial is not None or self.references.needed
        self.data = load_fitting_images(settings, teacher, self.readers) if needs_data else None
        self.class_shares = class_shares(settings, teacher, self.data)
        critic = starting_critic(settings, teacher, self.objective)
        check_log_variance(settings, self.objective, self.timestep_type)

        network = teacher.transformer.requires_grad_(False)
        self.start = starting_student(settings, teacher)
        averages = Averages(self.start.network, settings, images_per_update=self.global_batch_size)
        kind = None if self.adversarial is None else self.adversarial.kind
        self.critic = TrainedNetwork(
            self.accelerator,
            CriticNetwork(critic, kind, settings.critic_log_variance),
            settings,
            settings.learning_rate if settings.critic_learning_rate is None else settings.critic_learning_rate,
            total_updates=settings.max_steps * settings.critic_steps,
            max_grad_value=None if self.adversarial is None else self.adversarial.critic_grad_limit(values),
        )
        self.generator = TrainedNetwork(
            self.accelerator,
            self.start.network,
            settings,
            settings.learning_rate,
            total_updates=settings.max_steps * settings.generator_steps,
        )
        averages.prepare(self.accelerator)
        self.averages = averages
        network.eval()
        prepare_blocks(network, settings, self.objective.needs_field_gradient)
        if self.accelerator.is_fsdp2:
            shard(self.accelerator, network)
        else:
            if settings.mixed_precision == "bf16":
                keep_in_bfloat16(network)
            network.to(self.accelerator.device)
        if teacher.vae is not None:
            teacher.vae.to(self.accelerator.device)
        self.teacher_field = self._field(network, settings.guidance_scale)
        self.game_losses = DistillationLosses(
            self.objective,
            self.adversarial,
            self.interpolant,
            self.prediction_type,
            self.teacher_field,
            values,
            self.accelerator.autocast,
            sees_reference=self.references.bridge and self.references.seen,
        )
        self.time_samplers = {
            "critic": settings.build_time_sampler(self.interpolant, self.timestep_type),
            "generator": settings.build_generator_time_sampler(self.interpolant, self.timestep_type),
        }
        self.adversarial_times = settings.adversarial.build_time_sampler(self.interpolant, self.timestep_type)
        self.health = HealthMonitor()

    def _field(self, network: Callable[..., tuple[torch.Tensor, ...]], guidance_scale: float = 1.0) -> Field:
        interval = (self.settings.guidance_t_min, self.settings.guidance_t_max)
        return Field(
            network,
            self.interpolant,
            self.prediction_type,
            self.null_class,
            guidance_scale,
            interval,
            self.timestep_type,
        )

    # One iteration.

    @property
    def images_seen(self) -> int:
        """Samples that the student has generated for training so far."""
        return self.step * self.global_batch_size

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        settings = self.settings
        batches = [self._micro_batch(m) for m in range(settings.gradient_accumulation_steps)]
        generator_learns = self.images_seen >= settings.generator_start_images
        # With several micro-batches their graphs would all stay in memory: the generator's update runs them again.
        with torch.set_grad_enabled(generator_learns and len(batches) == 1):
            shared = [self._generate(batch, 0) for batch in batches]

        metrics: dict[str, torch.Tensor] = {}
        finite = True
        for k in range(settings.critic_steps):
            for m, (batch, samples) in enumerate(zip(batches, shared, strict=True)):
                with self.critic.forward_context(m):
                    loss, parts = self._critic_loss(batch, samples.detach(), k)
                    self.critic.backward(loss)
                _add(metrics, parts, settings.critic_steps * len(batches))
            norm, applied = self.critic.update()
            _add(metrics, {"critic_grad_norm": norm}, settings.critic_steps)
            finite &= applied

        for j in range(settings.generator_steps if generator_learns else 0):
            with self.critic.frozen() as critic:
                field = self._field(critic, settings.critic_guidance_scale)
                for m, batch in enumerate(batches):
                    with self.generator.forward_context(m):
                        has_graph = j == 0 and shared[m].requires_grad
                        samples = shared[m] if has_graph else self._generate(batch, j)
                        loss, parts = self._generator_loss(field, batch, samples, j)
                        self.generator.backward(loss)
                    _add(metrics, parts, settings.generator_steps * len(batches))
            norm, applied = self.generator.update()
            _add(metrics, {"generator_grad_norm": norm}, settings.generator_steps)
            finite &= applied
            self.averages.update(self.generator.unwrapped, self.step * settings.generator_steps + j)
        return metrics, finite

    def watch(self, means: dict[str, float]) -> list[str]:
        return self.health.check(means)

    def _micro_batch(self, micro_batch: int) -> MicroBatch:
        indices = self.indices(micro_batch)
        data = {} if self.data is None else self.next_batch(self.data, micro_batch)
        if self.class_shares is not None:
            u = self.noise.uniform("labels", self.step, indices=indices)
            labels = torch.searchsorted(self.class_shares.to(u.device), u, right=True)
        elif "labels" in data and self.settings.label_sampling != "uniform":
            labels = data["labels"]
        else:
            classes = max(1, self.num_classes)  # an unconditional network ignores its labels
            labels = self.noise.integers(classes, "labels", self.step, indices=indices)
        return MicroBatch(labels, data, indices)

    def _generate(self, batch: MicroBatch, update: int) -> torch.Tensor:
        noise = self._generator_noise("generator_noise", self.step, update, indices=batch.indices)
        with self.accelerator.autocast():
            return self._field(self.generator.module).one_step(
                noise, self.start.init_time, batch.labels, self.references.start(batch.data)
            )

    def _generator_noise(self, stream: str, *counters: int, indices: range) -> torch.Tensor | None:
        channels, *size = self.sample_shape
        channels = self.start.noise_channels if self.references.bridge else channels
        return self.noise.normal((channels, *size), stream, *counters, indices=indices) if channels else None

    def _draw(self, batch: MicroBatch, stream: str, update: int) -> Draw:
        u, noise = self.noise.uniform_and_normal(self.sample_shape, stream, self.step, update, indices=batch.indices)
        if self.adversarial_times is None:
            return Draw(self.time_samplers[stream](u), noise)
        own = self.noise.uniform(f"{stream}_adversarial", self.step, update, indices=batch.indices)
        return Draw(self.time_samplers[stream](u), noise, self.adversarial_times(own))

    def _generated(self, batch: MicroBatch, samples: torch.Tensor, draw: Draw) -> Images:
        """The samples with the other end of their path."""
        x1 = self.references.x1(samples, batch.data) if self.references.bridge else draw.noise
        return Images(samples, batch.labels, x1, self._seen(batch))

    def _seen(self, batch: MicroBatch) -> torch.Tensor | None:
        return batch.data["reference"] if self.references.seen else None

    def _critic_loss(
        self, batch: MicroBatch, samples: torch.Tensor, update: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        draw = self._draw(batch, "critic", update)
        fake, data = self._generated(batch, samples, draw), batch.data
        x1 = data["reference"] if self.references.bridge else draw.noise
        real = Images(data.get("images"), data.get("labels"), x1, self._seen(batch))
        if self.settings.critic_class_dropout_prob > 0:
            dropped = self.noise.uniform("labels", self.step, update, indices=batch.indices)
            dropped = dropped < self.settings.critic_class_dropout_prob
            fake, real = (images.with_class(self.null_class, dropped) for images in (fake, real))
        augmentation = self.augmentation(batch.indices, update)
        # One transformation for both: they share everything but the images.
        told = None if augmentation is None else augmentation.labels
        if augmentation is not None:
            fake, real = (images.augmented(augmentation) for images in (fake, real))
        return self.game_losses.critic_loss(self._field(self.critic.module), fake, real, draw, told)

    def _generator_loss(
        self, critic: Field, batch: MicroBatch, samples: torch.Tensor, update: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        judged = self.adversarial is not None and self.images_seen >= self.settings.adversarial.start_images
        draw = self._draw(batch, "generator", update)
        return self.game_losses.generator_loss(critic, self._generated(batch, samples, draw), draw, judged)

    # What comes out.

    def learning_rates(self) -> dict[str, float]:
        return {"learning_rate": self.generator.learning_rate, "critic_learning_rate": self.critic.learning_rate}

    def pipeline(self, network: nn.Module | None = None) -> OneStepInterpolantPipeline:
        teacher = self.teacher_pipeline
        scheduler = type(teacher.scheduler).from_config(
            teacher.scheduler.config,
            solver="euler",
            init_time=self.start.init_time,
            noise_channels=self.start.noise_channels,
        )
        network = self.averages.network if network is None else network
        settings = {name: teacher.config[name] for name in ("id2label", "vae_pixel_min", "image_upsampling")}
        return OneStepInterpolantPipeline(network, scheduler, vae=teacher.vae, **settings)

    def facts(self) -> dict[str, Any]:
        return {
            "network": describe_network(self.averages.network),
            "teacher": describe_teacher(self.settings.teacher, self.teacher_pipeline),
            "data": describe_data(self.settings.data, self.data),
            "objective_space": self.objective.space,
        }

    def sample_grid(self) -> Image.Image:
        """Rows: what the student starts from, if that is an image, its samples, and x̂0 of teacher and critic from these
        samples noised to β = α.
        """
        indices, roles = range(GRID_COLUMNS), self.references
        shown = self.shown_batch(self.data, GRID_COLUMNS) if roles.needed else {}
        labels = torch.arange(GRID_COLUMNS, device=self.accelerator.device) % max(1, self.num_classes)
        labels = shown["labels"] if roles.needed and roles.paired else labels
        batch = MicroBatch(labels, shown, indices)
        noise = self._generator_noise("samples", 0, indices=indices)
        pipeline = self.pipeline()
        half = torch.tensor(self.interpolant.middle_time(), device=labels.device)
        t = self.interpolant.nearest_time(half, self.timestep_type).expand(len(labels))
        draw = Draw(t, self.noise.normal(self.sample_shape, "samples", 1, indices=indices))
        with self.accelerator.autocast():
            start = roles.start(shown)
            samples = self._field(pipeline.transformer).one_step(noise, self.start.init_time, labels, start)
            made = self._generated(batch, samples, draw)
            x_t = self.interpolant.interpolate(samples, made.x1, t, draw.noise)
            critic = self._field(self.critic.unwrapped)
            rows = [samples, *(field.sample(x_t, t, labels, made.reference) for field in (self.teacher_field, critic))]
        titles = ["student", f"teacher, x0 at t={t[0]:.2f}", f"critic, x0 at t={t[0]:.2f}"]
        if start is not None:
            rows, titles = [start, *rows], ["reference", *titles]
        names = pipeline.config.id2label or {}
        columns = (
            [str(names.get(label, label)).split(",")[0] for label in labels.tolist()] if self.num_classes else None
        )
        return image_grid([pipeline.postprocess(row, "pil") for row in rows], titles, columns)


def _add(metrics: dict[str, torch.Tensor], parts: dict[str, torch.Tensor], count: int) -> None:
    """Adds one of `count` equal shares to each metric."""
    for name, value in parts.items():
        metrics[name] = metrics.get(name, 0.0) + value.detach() / count
