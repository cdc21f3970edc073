"""The game of three networks: a frozen teacher, a critic that follows the student, and a student of one or a few steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...critic import CriticNetwork, FeatureNetwork
from ...data import TrainingData
from ...errors import InputError
from ...loading import load_pipeline
from ...pipelines import Condition, Field, Guidance, InterpolantPipeline, OneStepInterpolantPipeline, view_network
from ...pipelines.interpolant_field import Network
from ...text_to_image.config import TextConfig
from ...text_to_image.network import shares_base
from ...text_to_image.teacher import not_text_to_image
from ...visualization import image_grid
from ..averaging.ema import Averages
from ..optimizers import OptimizerSettings
from ..parallel.blocks import has_dropout, keep_in_bfloat16, prepare_blocks
from ..parallel.sharding import place_frozen
from ..run.facts import describe_data, describe_network, describe_teacher
from ..trained_network import TrainedNetwork
from ..trainer import Trainer
from .config import DistillConfig
from .draws import MicroBatch, draw_for_loss
from .flow_map import FlowMap
from .health import HealthMonitor
from .images import check_enough_images, class_shares, load_fitting_images
from .levels import Level
from .losses import CriticTerms, DistillationLosses, Draw, GeneratorTerms, Images
from .plan import plan_distillation


class DistillationTrainer(Trainer):
    """Critic updates and student updates on one member of the objective family (see `si_distill.objectives`).

    One iteration is `critic_steps` critic updates and `generator_steps` student updates, in this order or the other
    (`generator_first`). With shared draws all of them use the same noise, classes and real images, and the first student
    update shares its forward with the critic; with fresh draws each update has its own. x_t is built from a generated sample
    with fresh (t, x1) each time. Networks that are not being updated are in evaluation mode.
    """

    settings: DistillConfig
    losses = ("generator_loss", "critic_loss")
    #: Images in a row of a sample grid.
    grid_columns = 10
    #: What the teacher's guidance does after its formula.
    guidance_rescale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def setup(self) -> None:
        settings = self.settings
        self.teacher_pipeline = teacher = self._load_teacher()
        self.plan = plan = plan_distillation(settings, teacher)
        self.interpolant, self.references, self.start = teacher.scheduler.interpolant, plan.references, plan.student
        self.objective, self.adversarial, self.levels = plan.objective, plan.adversarial, plan.levels
        self.null, self.sample_shape = teacher.network.null, teacher.network.sample_shape
        self.data = self._load_images() if plan.needs_images else None
        check_enough_images(settings, self.data, self.global_batch_size)
        self.class_shares = class_shares(settings, teacher, self.data)
        teacher.transformer.requires_grad_(False)
        self._build_trained(plan.critic)
        self._place_teacher()
        self._build_losses()
        self.flow_map = self._build_flow_map() if settings.flow_map.weight else None
        self.health = HealthMonitor()
        total, waits = settings.max_steps * self.global_batch_size, settings.generator_start_images
        if total <= waits:
            self.accelerator.print(
                f"warning: the student is trained from image {waits:,} on (`generator_start_images`), but this run makes "
                f"{total:,}: it will stay as it is. Raise max_steps, or lower it."
            )

    # What networks are told of an image.

    def _load_teacher(self) -> InterpolantPipeline:
        settings = self.settings
        if settings.lora_rank is not None or settings.text != TextConfig():
            raise InputError(
                "`lora_rank` and `text` are for text-to-image pipelines of diffusers: leave them out, or give one. "
                f"{not_text_to_image(settings.teacher)}"
            )
        return load_pipeline(InterpolantPipeline, "teacher", settings.teacher, settings.trust_remote_code)

    def _load_images(self) -> TrainingData:
        return load_fitting_images(self.settings, self.teacher_pipeline, self.readers)

    @property
    def num_classes(self) -> int:
        """How many labels there are; 0 without classes."""
        return self.teacher_pipeline.network.num_classes

    @property
    def null_label(self) -> int | None:
        """The label that means none of them."""
        return self.teacher_pipeline.network.null_class

    def _condition(self, labels: torch.Tensor | None, image: torch.Tensor | None = None) -> Condition:
        """What networks are told of images with these labels."""
        return Condition(labels, image=image)

    def _build_trained(self, critic: CriticNetwork) -> None:
        """Critic and student with their optimizers, and the student's averages."""
        settings = self.settings
        self.student_drops = has_dropout(self.start.network) or settings.student_class_dropout_prob > 0
        self.averages = Averages(self.start.network, settings, images_per_update=self.global_batch_size)
        of_critic = OptimizerSettings.of(
            settings.of_critic(),
            total_updates=settings.max_steps * settings.critic_steps,
            max_grad_value=settings.adversarial.max_grad_value,
        )
        updates = settings.max_steps * settings.generator_steps
        of_generator = OptimizerSettings.of(vars(settings), total_updates=updates)
        self.critic = TrainedNetwork(self.accelerator, critic, settings, of_critic)
        self.generator = TrainedNetwork(self.accelerator, self.start.network, settings, of_generator)
        self.averages.prepare(self.accelerator)

    def _place_teacher(self) -> None:
        """The frozen teacher on its device, sharded or in bfloat16 where the run is, and its field."""
        settings, teacher = self.settings, self.teacher_pipeline
        network = teacher.transformer.eval()
        shared = shares_base(self.start.network)
        teacher_features = settings.adversarial.features == "teacher"
        prepare_blocks(network, settings, shared or self.objective.needs_field_gradient or teacher_features)
        if settings.mixed_precision == "bf16" and not shared and not self.accelerator.is_fsdp2:
            keep_in_bfloat16(network)
        place_frozen(self.accelerator, network, shared)
        if teacher.vae is not None:
            teacher.vae.to(self.accelerator.device)
        seen = FeatureNetwork(network) if teacher_features else view_network(network)
        self.teacher_field = self._field(seen, settings.guidance_scale)

    def _build_losses(self) -> None:
        settings = self.settings
        self.game_losses = DistillationLosses(
            self.objective,
            self.adversarial,
            self.teacher_field,
            math.prod(self.sample_shape),
            self.accelerator.autocast,
            sees_reference=self.references.bridge and self.references.seen,
            teacher_features=settings.adversarial.features == "teacher",
            critic_sum=settings.of_critic()["loss_reduction"] == "sum",
            generator_sum=settings.loss_reduction == "sum",
            scale=settings.loss_scale,
        )

    def _build_flow_map(self) -> FlowMap:
        term, view = self.settings.flow_map, self.teacher_pipeline.network
        guidance = Guidance(self.settings.guidance_scale, (term.guidance_t_min, term.guidance_t_max))
        teacher = Field(view, self.teacher_pipeline.scheduler, self.null, guidance)
        return FlowMap(self.settings, teacher, self.start.init_time, view.augment_dim)

    def _field(self, network: Network, guidance_scale: float = 1.0) -> Field:
        """The teacher's field, or a critic's."""
        interval = (self.settings.guidance_t_min, self.settings.guidance_t_max)
        guidance = Guidance(guidance_scale, interval, rescale=self.guidance_rescale)
        return Field(network, self.teacher_pipeline.scheduler, self.null, guidance)

    def _critic_field(self, network: Network, level: Level, guidance_scale: float = 1.0) -> Field:
        """The critic's field, of images of this level."""
        told = self.levels.told(network, level) if self.settings.critic_sees_level else network
        return self._field(told, guidance_scale)

    def _student_field(self, network: nn.Module) -> Field:
        settings = self.settings
        guidance = Guidance(settings.student_guidance_scale, channels=settings.student_guidance_channels)
        return Field(view_network(network), self.start.scheduler, self.null, guidance)

    # One iteration.

    @property
    def images_seen(self) -> int:
        """Samples that the student has generated for its own updates so far, those that it did not learn from included."""
        return self.step * self.global_batch_size

    @property
    def batches_per_iteration(self) -> int:
        return self.settings.gradient_accumulation_steps * self.settings.draws_per_iteration

    def iteration(self) -> tuple[dict[str, torch.Tensor], bool]:
        settings = self.settings
        learns = self.images_seen >= settings.generator_start_images
        metrics: dict[str, torch.Tensor] = {}
        fresh, critic_steps = settings.critic_draws == "fresh", settings.critic_steps
        # Fresh draws of the student's updates are made whether it learns or not: the place in the data is a function of the
        # step.
        later = [self._draw_batches(critic_steps + j) for j in range(1, settings.generator_steps)] if fresh else []
        # What the student's first update and, where draws are shared, the critic's learn from.
        batches = self._draw_batches(*[critic_steps] * (fresh and not settings.generator_first))
        shared, graphs = self._shared_samples(batches, learns) if settings.generator_first or not fresh else ([], [])
        finite = True
        if settings.generator_first and learns:
            finite &= self._update_generator(batches, later, graphs, metrics)
        for k in range(critic_steps):
            drawn, samples = batches, shared
            if fresh and not (k == 0 and settings.generator_first):
                drawn = self._draw_batches(k)
                samples = [self._samples(batch) for batch in drawn]
            finite &= self._update_critic(k, drawn, samples, metrics)
        if learns and not settings.generator_first:
            finite &= self._update_generator(batches, later, graphs, metrics)
        return metrics, finite

    def _shared_samples(self, batches: list[MicroBatch], learns: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Samples for the critic, and the same with their graphs for the student's first update where one forward can serve
        both: not where dropout makes it two, nor with several micro-batches, whose graphs would all stay in memory.
        """
        if learns and len(batches) == 1 and not self.student_drops:
            with self.generator.training():
                graph = self._trained_samples(batches[0])
            return [graph.detach()], [graph]
        return [self._samples(batch) for batch in batches], []

    def _update_critic(
        self, k: int, batches: list[MicroBatch], samples: list[torch.Tensor], metrics: dict[str, torch.Tensor]
    ) -> bool:
        """The critic's update number k of the iteration; whether it was finite."""
        count = self.settings.critic_steps
        with self.critic.training():
            for m, (batch, generated) in enumerate(zip(batches, samples, strict=True)):
                with self.critic.forward_context(m):
                    terms = self._critic_loss(batch, generated, k)
                    self.critic.backward(terms.total)
                _add(metrics, terms.logged(), count * len(batches))
        norm, applied = self.critic.update()
        _add(metrics, {"critic_grad_norm": norm}, count)
        return applied

    def _update_generator(
        self,
        batches: list[MicroBatch],
        later: list[list[MicroBatch]],
        graphs: list[torch.Tensor],
        metrics: dict[str, torch.Tensor],
    ) -> bool:
        """All of the student's updates of the iteration; whether they were finite.

        Args:
            batches: of the first one.
            later: fresh ones of the others; where there are none they have the first one's with new noise.
            graphs: the samples of the first one with their graphs, where they are there already.
            metrics: is added to.
        """
        settings, finite = self.settings, True
        for j in range(settings.generator_steps):
            if j > 0:
                batches = later[j - 1] if later else [self._with_new_noise(batch, j) for batch in batches]
            with self.critic.frozen() as critic, self.generator.training():
                for m, batch in enumerate(batches):
                    field = self._critic_field(critic, batch.level, settings.critic_guidance_scale)
                    with self.generator.forward_context(m):
                        samples = graphs[m] if j == 0 and graphs else self._trained_samples(batch, j)
                        if self.flow_map is not None:
                            samples.retain_grad()
                        terms = self._generator_loss(field, batch, samples, j)
                        self.generator.backward(terms.total)
                        logged = terms.logged()
                        if self.flow_map is not None:
                            logged["flow_map_residual"] = self._follow_teacher(batch, samples.grad, j)
                    _add(metrics, logged, settings.generator_steps * len(batches))
            norm, applied = self.generator.update()
            _add(metrics, {"generator_grad_norm": norm}, settings.generator_steps)
            finite &= applied
            self.averages.update(self.generator.unwrapped, self.step * settings.generator_steps + j)
        return finite

    def watch(self, means: dict[str, float]) -> list[str]:
        return self.health.check(means)

    def _draw_batches(self, *draw: int) -> list[MicroBatch]:
        """The micro-batches of one draw: of the iteration's shared one, or of fresh draw number `draw`."""
        return [self._micro_batch(m, *draw) for m in range(self.settings.gradient_accumulation_steps)]

    def _with_new_noise(self, batch: MicroBatch, update: int) -> MicroBatch:
        noise = self._student_noise("generator_noise", self.step, update, indices=batch.indices)
        return replace(batch, noise=noise, key=(self.step, -1, update))

    def _micro_batch(self, micro_batch: int, *draw: int) -> MicroBatch:
        indices = self.indices(micro_batch)
        data = {} if self.data is None else self.next_batch(self.data, micro_batch, *draw)
        labels = "fresh_labels" if draw else "labels"
        if self.class_shares is not None:
            u = self.noise.uniform(labels, self.step, *draw, indices=indices)
            labels = torch.searchsorted(self.class_shares.to(u.device), u, right=True)
        elif "labels" in data and self.settings.label_sampling != "uniform":
            labels = data["labels"]
        else:
            classes = max(1, self.num_classes)  # an unconditional network ignores its labels
            labels = self.noise.integers(classes, labels, self.step, *draw, indices=indices)
        counters = ("fresh_noise", self.step, *draw) if draw else ("generator_noise", self.step, 0)
        noise, key = self._student_noise(*counters, indices=indices), (self.step, draw[0] if draw else -1)
        return MicroBatch(noise, labels, data, indices, self.levels.draw(*key), (*key, 0))

    def _student_noise(self, stream: str, *counters: int, indices: range) -> torch.Tensor | None:
        channels, *size = self.sample_shape
        channels = self.start.noise_channels if self.references.bridge else channels
        return self.noise.normal((channels, *size), stream, *counters, indices=indices) if channels else None

    @torch.no_grad()
    def _samples(self, batch: MicroBatch) -> torch.Tensor:
        """Generated images for the critic, by the student in evaluation mode."""
        return self._generate(self.generator.module, batch)

    def _trained_samples(self, batch: MicroBatch, update: int = 0) -> torch.Tensor:
        """Generated images with their graph, for the student's own update."""
        share = self.settings.student_class_dropout_prob
        if share > 0:
            u = self.noise.uniform("student_label_dropout", self.step, update, indices=batch.indices)
            batch = replace(batch, labels=torch.where(u < share, self.null_label, batch.labels))
        return self._generate(self.generator.module, batch)

    def _generate(self, network: nn.Module, batch: MicroBatch) -> torch.Tensor:
        reference, bridge = self.references.start(batch.data), self.references.bridge
        image = view_network(network).condition_image(reference, batch.noise if bridge else None)
        x1 = reference if bridge else batch.noise
        field, condition = self._student_field(network), self._condition(batch.labels, image)
        with self.accelerator.autocast():
            if batch.level.step == 0:
                return field.one_step(x1, self.start.init_time, condition)
            return field.sample(
                *self.levels.state(field, x1, batch.level, condition, self.noise, batch.key, batch.indices), condition
            )

    def _loss_draw(self, batch: MicroBatch, loss: str, update: int) -> Draw:
        return draw_for_loss(self.plan, self.settings.adversarial, self.noise, loss, (self.step, update), batch.indices)

    def _generated(self, batch: MicroBatch, samples: torch.Tensor) -> Images:
        """The samples with the other end of a bridge's path."""
        return Images(samples, self._told(batch, batch.labels), self.references.x1(samples, batch.data))

    def _told(self, batch: MicroBatch, labels: torch.Tensor | None) -> Condition:
        """What teacher and critic are told of images of these classes."""
        return self._condition(labels, batch.data["reference"] if self.references.seen else None)

    def _critic_loss(self, batch: MicroBatch, samples: torch.Tensor, update: int) -> CriticTerms:
        draw, data = self._loss_draw(batch, "critic", update), batch.data
        fake = self._generated(batch, samples)
        x1 = data["reference"] if self.references.bridge else None
        real = Images(data.get("images"), self._told(batch, data.get("labels")), x1)
        if self.settings.critic_class_dropout_prob > 0:
            dropped = self.noise.uniform("labels", self.step, update, indices=batch.indices)
            dropped = dropped < self.settings.critic_class_dropout_prob
            fake, real = (images.nulled(self.null, dropped) for images in (fake, real))
        augmentation = self.augmentation(batch.indices, update)
        if augmentation is not None:
            fake = fake.augmented(augmentation)
            if not self.settings.adversarial.shared_augmentation:
                augmentation = self.augmentation(batch.indices, update, 1)
            real = real.augmented(augmentation)
        scale = self.settings.critic_training_guidance_scale
        critic = self._critic_field(self.critic.module, batch.level, scale)
        return self.game_losses.critic_loss(critic, fake, real, draw)

    def _generator_loss(self, critic: Field, batch: MicroBatch, samples: torch.Tensor, update: int) -> GeneratorTerms:
        judged = self.adversarial is not None and self.images_seen >= self.settings.adversarial.start_images
        draw = self._loss_draw(batch, "generator", update)
        return self.game_losses.generator_loss(critic, self._generated(batch, samples), draw, judged)

    def _follow_teacher(self, batch: MicroBatch, of_objective: torch.Tensor, update: int) -> torch.Tensor:
        """Adds the gradient of the flow-map term, and gives its mean squared residual, shape ().

        It is scaled to the size of the objective's at the images, (B, …), summed over the images of all processes.
        """
        paths = self.flow_map.paths(self.noise, self.sample_shape, batch.indices, self.step, update)
        condition = self._condition(batch.labels, self.references.start(batch.data))[paths.rows]
        student = self._student_field(self.generator.module)
        with self.accelerator.autocast():
            x_t = self.flow_map.starts(student, paths, condition)
            x0, gradient, residual = self.flow_map.gradient(student, x_t, paths.t, paths.s, condition)
        sizes = torch.stack([each.flatten(1).norm(dim=1).sum() for each in (of_objective, gradient)])
        wanted, own = self.accelerator.reduce(sizes, "sum")
        scale = self.settings.flow_map.weight * wanted / own.clamp(min=torch.finfo(own.dtype).tiny)
        self.accelerator.backward((x0 * scale * gradient).sum())
        # A rank may have one image more than another: over the expected number the ranks' mean is that of all images.
        return residual.square().flatten(1).mean(1).sum() / (len(of_objective) * self.settings.flow_map.ratio)

    # What comes out.

    @property
    def networks(self) -> dict[str, TrainedNetwork]:
        return {"": self.generator, "critic_": self.critic}

    def pipeline(self, network: nn.Module | None = None) -> OneStepInterpolantPipeline:
        teacher = self.teacher_pipeline
        scheduler = type(teacher.scheduler).from_config(self.start.scheduler.config)
        network = self.averages.network if network is None else network
        settings = {name: teacher.config[name] for name in ("id2label", "vae_pixel_min", "image_upsampling")}
        if self.settings.student_guidance_scale != 1:
            channels = self.settings.student_guidance_channels
            settings["guidance"] = {"scale": self.settings.student_guidance_scale, "channels": channels}
        return OneStepInterpolantPipeline(network, scheduler, vae=teacher.vae, **settings)

    def facts(self) -> dict[str, Any]:
        return {
            "network": describe_network(self.averages.network),
            "teacher": describe_teacher(self.settings.teacher, self.teacher_pipeline),
            "data": describe_data(self.settings.data, self.data),
            "objective_space": self.objective.space,
        }

    def sample_grid(self) -> Image.Image:
        """Rows: what the student starts from, if that is an image, its samples with each number of steps, and x̂0 of teacher
        and critic from the last of these noised to β = α.
        """
        indices, roles = range(self.grid_columns), self.references
        shown = self.shown_batch(self.data, self.grid_columns) if roles.needed else {}
        labels = torch.arange(self.grid_columns, device=self.accelerator.device) % max(1, self.num_classes)
        labels = shown["labels"] if roles.needed and roles.paired else labels
        batch = MicroBatch(self._student_noise("samples", 0, indices=indices), labels, shown, indices)
        half = torch.tensor(self.interpolant.middle_time(), device=labels.device)
        timestep_type = self.teacher_pipeline.scheduler.config.timestep_type
        t = self.interpolant.nearest_time(half, timestep_type).expand(len(labels))
        draw = Draw(t, self.noise.normal(self.sample_shape, "samples", 1, indices=indices))
        with self.accelerator.autocast():
            start = roles.start(shown)
            drawn = []
            for count in self.levels.counts:
                batch = replace(batch, level=Level(count, count - 1), key=(-1, -1, 0))
                drawn.append(self._generate(self.averages.network, batch))
            samples = drawn[-1]
            made = self._generated(batch, samples)
            x1 = draw.noise if made.x1 is None else made.x1
            x_t = self.interpolant.interpolate(samples, x1, t, draw.noise)
            critic = self._critic_field(self.critic.unwrapped, batch.level)
            rows = [*drawn, *(field.sample(x_t, t, made.condition) for field in (self.teacher_field, critic))]
        several = self.levels.counts != [1]
        titles = [f"student, {count} steps" if several else "student" for count in self.levels.counts]
        titles += [f"teacher, x0 at t={t[0]:.2f}", f"critic, x0 at t={t[0]:.2f}"]
        if start is not None:
            rows, titles = [start, *rows], ["reference", *titles]
        columns = self._names(labels.tolist()) if self.num_classes else None
        return image_grid(self._pictures(rows), titles, columns)

    def _names(self, labels: list[int]) -> list[str]:
        """Titles of images with these labels."""
        names = self.teacher_pipeline.config["id2label"] or {}
        return [str(names.get(label, label)).split(",")[0] for label in labels]

    def _pictures(self, rows: list[torch.Tensor]) -> list[list[Image.Image]]:
        """Samples (B, C, H, W) as pictures; of latents that nothing decodes the first channels, as colours."""
        pipeline = self.pipeline()
        return [pipeline.postprocess(row if pipeline.vae is not None else row[:, :3], "pil") for row in rows]


def _add(metrics: dict[str, torch.Tensor], parts: dict[str, torch.Tensor], count: int) -> None:
    """Adds one of `count` equal shares to each metric."""
    for name, value in parts.items():
        metrics[name] = metrics.get(name, 0.0) + value.detach() / count
