"""The game of three networks: a frozen teacher, a critic that follows the student, and a one-step student."""

import copy
from dataclasses import dataclass

import torch
from PIL import Image

from ..data import load_images
from ..errors import InputError
from ..objectives import Fields
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..velocity import Field
from ..visualization import image_grid
from .config import DistillConfig
from .ema import EMA
from .networks import TrainedNetwork
from .trainer import Trainer


@dataclass
class MicroBatch:
    """What the critic and the generator share in one iteration: labels (B,), real images if used, places in the batch."""

    labels: torch.Tensor
    real: torch.Tensor | None
    indices: range


class DistillationTrainer(Trainer):
    """Critic updates and generator updates on one member of the objective family (see `si_distill.objectives`).

    One iteration is `critic_steps` critic updates and `generator_steps` generator updates. All critic updates and the
    first generator update share ONE generator forward; x_t is built from a generated sample with fresh (t, x1) each time.
    """

    settings: DistillConfig

    def setup(self) -> None:
        settings = self.settings
        self.objective = settings.build_objective()
        self.teacher_pipeline = teacher = _load_teacher(settings.teacher)
        self.interpolant = teacher.scheduler.interpolant
        self.prediction_type = teacher.scheduler.config.prediction_type
        settings.check_times(self.interpolant)
        try:
            self.objective.check_interpolant(self.interpolant)
        except ValueError as error:
            raise InputError(str(error)) from None
        null_class = teacher.transformer.null_class
        if settings.guidance_scale != 1 and null_class is None:
            raise InputError(
                f"`guidance_scale` is {settings.guidance_scale}, but the teacher has no null class: it was trained "
                "without label dropout. Use guidance_scale=1."
            )
        self.num_classes = teacher.transformer.config.num_classes
        config = teacher.transformer.config
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.data = self._load_real_data() if self.objective.uses_real_data else None
        self.init_time = (
            self.interpolant.default_init_time(self.prediction_type)
            if settings.init_time is None
            else settings.init_time
        )
        if not self.interpolant.reaches_sample(self.init_time, self.prediction_type):
            raise InputError(
                f"`init_time` is {self.init_time}, where the teacher's {self.prediction_type} prediction says nothing about "
                "the sample (α = 0): leave it out, or set it below 1."
            )

        network = teacher.transformer.requires_grad_(False)
        ema = EMA.of(network, settings.ema_decay)
        self.critic = TrainedNetwork(
            self.accelerator,
            copy.deepcopy(network),
            settings,
            settings.learning_rate if settings.critic_learning_rate is None else settings.critic_learning_rate,
            total_updates=settings.max_steps * settings.critic_steps,
        )
        self.generator = TrainedNetwork(
            self.accelerator,
            copy.deepcopy(network),
            settings,
            settings.learning_rate,
            total_updates=settings.max_steps * settings.generator_steps,
        )
        ema.network = self.accelerator.prepare_model(ema.network, evaluation_mode=True)  # saved with the rest
        self.ema = ema
        teacher.to(self.accelerator.device)
        self.teacher_field = Field(
            network.eval(), self.interpolant, self.prediction_type, null_class, settings.guidance_scale
        )

    def _load_real_data(self):
        data = load_images(self.settings.data)
        if self.teacher_pipeline.vae is not None:
            raise InputError(
                f"The objective {self.objective.name!r} uses real data and the teacher works on latents: real images "
                "cannot be used without precomputed latents. Choose an objective without real data, e.g. sid."
            )
        found = (data.channels, data.size, data.size)
        if found != self.sample_shape or len(data.class_names) != self.num_classes:
            raise InputError(
                f"The teacher generates {self.num_classes} classes of shape {self.sample_shape}, but the data set "
                f"{data.name} has {len(data.class_names)} classes of shape {found}."
            )
        return data

    # One iteration.

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        settings = self.settings
        batches = [self._micro_batch(m) for m in range(settings.gradient_accumulation_steps)]
        shared: list[torch.Tensor]
        if len(batches) == 1:
            shared = [self._generate(batches[0], 0)]
        else:
            # With several micro-batches their graphs would all stay in memory: the generator's update runs them again.
            with torch.no_grad():
                shared = [self._generate(batch, 0) for batch in batches]

        metrics: dict[str, torch.Tensor] = {}
        finite = True
        for k in range(settings.critic_steps):
            for m, (batch, samples) in enumerate(zip(batches, shared, strict=True)):
                with self.critic.forward_context(m):
                    loss = self._critic_loss(batch, samples.detach(), k)
                    self.critic.backward(loss)
                _add(metrics, "critic_loss", loss, settings.critic_steps * len(batches))
            norm, applied = self.critic.update()
            _add(metrics, "critic_grad_norm", norm, settings.critic_steps)
            finite &= applied

        for j in range(settings.generator_steps):
            with self.critic.frozen() as critic:
                field = Field(critic, self.interpolant, self.prediction_type)
                for m, batch in enumerate(batches):
                    with self.generator.forward_context(m):
                        has_graph = j == 0 and shared[m].requires_grad
                        samples = shared[m] if has_graph else self._generate(batch, j)
                        loss, distance = self._generator_loss(field, batch, samples, j)
                        self.generator.backward(loss)
                    _add(metrics, "generator_loss", loss, settings.generator_steps * len(batches))
                    _add(metrics, "field_distance", distance, settings.generator_steps * len(batches))
            norm, applied = self.generator.update()
            _add(metrics, "generator_grad_norm", norm, settings.generator_steps)
            finite &= applied
            if applied:
                self.ema.update(self.generator.unwrapped, self.step * settings.generator_steps + j)
        return metrics, finite

    def _micro_batch(self, micro_batch: int) -> MicroBatch:
        indices = self.indices(micro_batch)
        if self.data is None:
            return MicroBatch(
                self.noise.integers(self.num_classes, "labels", self.step, indices=indices), None, indices
            )
        images, labels = self.next_images(self.data)
        return MicroBatch(labels, images, indices)

    def _generate(self, batch: MicroBatch, update: int) -> torch.Tensor:
        noise = self.noise.normal(self.sample_shape, "generator_noise", self.step, update, indices=batch.indices)
        with self.accelerator.autocast():
            field = Field(self.generator.module, self.interpolant, self.prediction_type)
            return field.one_step(noise, self.init_time, batch.labels)

    def _times_and_reference(self, batch: MicroBatch, stream: str, update: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh (t, x1), independent of the noise behind the samples."""
        u, x1 = self.noise.uniform_and_normal(self.sample_shape, stream, self.step, update, indices=batch.indices)
        return self.time_sampler(u), x1

    def _critic_loss(self, batch: MicroBatch, samples: torch.Tensor, update: int) -> torch.Tensor:
        t, x1 = self._times_and_reference(batch, "critic", update)
        critic = Field(self.critic.module, self.interpolant, self.prediction_type)

        def fields(x0: torch.Tensor) -> Fields:
            space = self.objective.space
            x_t = self.interpolant.interpolate(x0, x1, t)
            with self.accelerator.autocast():
                prediction = critic(x_t, t, batch.labels, space)
                teacher = None
                if self.objective.uses_teacher_in_critic:
                    with torch.no_grad():
                        teacher = self.teacher_field(x_t, t, batch.labels, space)
            return prediction, teacher, self.interpolant.target(x0, x1, t, space)

        real = None if batch.real is None else fields(batch.real)
        weight = self.objective.loss_weight(self.interpolant.coefficients(t).kappa, weight="uniform")
        return (weight * self.objective.critic_loss(*fields(samples), real=real)).mean()

    def _generator_loss(
        self, critic: Field, batch: MicroBatch, samples: torch.Tensor, update: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and mean ‖v_ψ − v*‖² in velocity space for the log."""
        objective, space = self.objective, self.objective.space
        t, x1 = self._times_and_reference(batch, "generator", update)
        x_t = self.interpolant.interpolate(samples, x1, t)
        seen = x_t if objective.needs_field_gradient else x_t.detach()
        with torch.set_grad_enabled(objective.needs_field_gradient), self.accelerator.autocast():
            teacher = self.teacher_field.predict(seen, t, batch.labels)
            fake = critic.predict(seen, t, batch.labels)

        def to_space(prediction: torch.Tensor, target: str) -> torch.Tensor:
            return self.interpolant.convert(prediction, seen, t, self.prediction_type, target)

        kappa = self.interpolant.coefficients(t).kappa
        with torch.no_grad():
            weight = objective.loss_weight(kappa, samples, to_space(teacher, "sample"))
            distance = (to_space(fake, "velocity") - to_space(teacher, "velocity")).square().mean()
        target = self.interpolant.target(samples, x1, t, space)
        loss = objective.generator_loss(to_space(fake, space), to_space(teacher, space), target, weight)
        return loss.mean(), distance

    # What comes out.

    def learning_rates(self) -> dict[str, float]:
        return {"learning_rate": self.generator.learning_rate, "critic_learning_rate": self.critic.learning_rate}

    def pipeline(self) -> OneStepInterpolantPipeline:
        teacher = self.teacher_pipeline
        scheduler = type(teacher.scheduler).from_config(
            teacher.scheduler.config, solver="euler", init_time=self.init_time
        )
        network = self.accelerator.unwrap_model(self.ema.network, keep_fp32_wrapper=False)
        return OneStepInterpolantPipeline(network, scheduler, vae=teacher.vae, id2label=teacher.config.id2label)

    def sample_grid(self) -> Image.Image:
        """Rows: the student's samples, and x̂0 of teacher and critic from these samples noised to β = α."""
        labels = torch.arange(10, device=self.accelerator.device) % self.num_classes
        noise, x1 = (
            self.noise.normal(self.sample_shape, "samples", row, indices=range(len(labels))) for row in range(2)
        )
        pipeline = self.pipeline()
        half = self.interpolant.time_of_ratio(1.0)
        t = torch.full((len(labels),), half, device=noise.device)
        with self.accelerator.autocast():
            student = Field(pipeline.transformer, self.interpolant, self.prediction_type)
            samples = student.one_step(noise, self.init_time, labels)
            x_t = self.interpolant.interpolate(samples, x1, t)
            critic = Field(self.critic.unwrapped, self.interpolant, self.prediction_type)
            rows = [samples, self.teacher_field(x_t, t, labels, "sample"), critic(x_t, t, labels, "sample")]
        pictures = [pipeline.postprocess(row, "pil") for row in rows]
        names = pipeline.config.id2label or {}
        titles = [str(names.get(label, label)).split(",")[0] for label in labels.tolist()]
        return image_grid(pictures, ["student", f"teacher, x0 at t={half:.2f}", f"critic, x0 at t={half:.2f}"], titles)


def _load_teacher(name: str) -> InterpolantPipeline:
    try:
        return InterpolantPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the teacher {name!r}: {error}") from error


def _add(metrics: dict[str, torch.Tensor], name: str, value: torch.Tensor, count: int) -> None:
    """Adds one of `count` equal shares to a metric."""
    metrics[name] = metrics.get(name, 0.0) + value.detach() / count
