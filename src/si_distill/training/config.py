"""Settings of the training scripts: dataclasses, read from YAML and `--key value`, that refuse what cannot work.

Names are those of transformers' `TrainingArguments` where it has them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..adversarial import KINDS, AdversarialTerm
from ..data.config import DataConfig
from ..errors import InputError
from ..evaluation.config import MeasurementConfig
from ..interpolants import PREDICTIONS, TIMESTEP_TYPES, Interpolant, get_interpolant
from ..objectives import DistillationObjective, get_objective
from ..settings import at_least, positive, setting
from .loss_weights import LOSS_WEIGHTS, regression_weight
from .posthoc_ema import power_exponent
from .profiling import RECORDED, WARM_UP
from .teacher_references import check_teacher_references
from .times import TIME_SAMPLERS, TimeSampler


@dataclass
class TrainingConfig:
    """What the teacher's training and the distillation share."""

    output_dir: str = setting("", "Run folder: checkpoints, metrics, samples, and the pipeline itself.")
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = setting(0, "Seed of weights, data order, noise and times.")
    max_steps: int = setting(1000, "Iterations to train.")
    per_device_train_batch_size: int = setting(64, "Samples per device and micro-batch.")
    gradient_accumulation_steps: int = setting(1, "Micro-batches per update, for every network.")
    learning_rate: float = setting(1e-4, "Peak learning rate of the trained network (the student when distilling).")
    lr_scheduler_type: str = setting("constant", "Shape after the warm-up.", ("constant", "cosine", "linear"))
    lr_warmup_steps: int = setting(0, "Updates of linear warm-up.")
    adam_beta1: float = setting(0.9, "First-moment decay of Adam.")
    adam_beta2: float = setting(0.999, "Second-moment decay of Adam.")
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this global norm.")
    augment_prob: float = setting(
        0.0, "Probability of each labelled augmentation; 0 is none. EDM: 0.12 (CIFAR-10), 0.15 (FFHQ, AFHQv2)."
    )
    ema_decay: float = setting(0.999, "Decay of the weights' moving average; warmed up as (1 + n) / (10 + n).")
    ema_halflife_images: float | None = setting(None, "Its half-life in images, instead of `ema_decay`.")
    ema_rampup_ratio: float | None = setting(
        0.05, "Bounds half-lives by this share of the images seen; EDM, SiD: 0.05."
    )
    ema_extra: list[float] = setting(
        [], "Further averages, in ema/: decays (below 1) or half-lives in images (from 1)."
    )
    ema_power_sigmas: list[float] = setting(
        [], "Power-function averages to snapshot, by relative width; EDM2: 0.05, 0.1."
    )
    ema_snapshot_steps: int | None = setting(None, "Iterations between their snapshots; `save_steps` when not given.")
    time_sampler: str = setting("uniform", "Law of the training times t, or of σ = β/α.", TIME_SAMPLERS)
    t_min: float = setting(0.0, "Smallest training time.")
    t_max: float = setting(1.0, "Largest training time.")
    time_mean: float = setting(0.0, "Mean of logit(t) for `logit_normal`, of ln σ for `lognormal` (EDM: -1.2).")
    time_std: float = setting(1.0, "Standard deviation of the same (EDM: 1.2).")
    mixed_precision: str = setting("no", "`bf16` runs networks in bfloat16; losses stay in float32.", ("no", "bf16"))
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass: less memory, longer iterations, the same numbers."
    )
    compile: bool = setting(False, "Compile the networks' repeated blocks by torch.compile.")
    dataloader_num_workers: int = setting(0, "Processes that read images, per device.")
    logging_steps: int = setting(50, "Iterations between lines of metrics.jsonl.")
    eval_steps: int = setting(500, "Iterations between sample grids in samples/.")
    eval_metric_steps: int | None = setting(
        None, "Iterations between measurements of the pipeline; off when not given."
    )
    metric_for_best_model: str = setting(
        "frechet_distance", "The pipeline with the smallest one is kept in best/.", ("frechet_distance", "kid")
    )
    evaluation: MeasurementConfig = field(default_factory=MeasurementConfig)
    save_steps: int = setting(500, "Iterations between checkpoints.")
    save_total_limit: int = setting(2, "Checkpoints to keep.")
    report_to: str = setting("none", "An Accelerate tracker: `wandb`, `tensorboard`, … or `none`.")
    resume_from_checkpoint: str | None = setting(None, "`latest`, or a folder under checkpoints/.")
    overwrite_output_dir: bool = setting(False, "Delete the run that `output_dir` holds and start again.")
    push_to_hub: bool = setting(False, "Publish the finished pipeline on the Hub.")
    hub_model_id: str | None = setting(None, "Where: `user/name`.")
    hub_private_repo: bool = setting(False, "Whether a new repository there is private.")
    dry_run: bool = setting(False, "Say what the run would need and do: no weights, no images, nothing written.")
    profile: bool = setting(
        False, "Record the fourth to sixth iteration of this start: a trace and a table in profile/."
    )

    #: What may change when a run is resumed; everything else decides the trajectory. The batch may be cut otherwise as
    #: long as an update keeps its number of images, which the checkpoint knows.
    RESUMABLE = frozenset(
        "output_dir max_steps logging_steps eval_steps save_steps save_total_limit report_to resume_from_checkpoint "
        "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing "
        "overwrite_output_dir dataloader_num_workers ema_snapshot_steps eval_metric_steps metric_for_best_model evaluation "
        "push_to_hub hub_model_id hub_private_repo dry_run profile teacher_model data.max_corrupt_images".split()
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise InputError("`output_dir` is not set: give the folder of the run, e.g. --output_dir runs/my-run.")
        if self.push_to_hub and not self.hub_model_id:
            raise InputError("`push_to_hub` is set, but `hub_model_id` is not: give the repository, user/name.")
        for name in (
            "max_steps per_device_train_batch_size gradient_accumulation_steps logging_steps eval_steps save_steps "
            "save_total_limit"
        ).split():
            at_least(name, getattr(self, name), 1)
        for name in ("seed", "lr_warmup_steps", "dataloader_num_workers"):
            at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "time_std"):
            positive(name, getattr(self, name))
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        if self.eval_metric_steps is not None and self.data.streaming and not self.evaluation.reference:
            raise InputError(
                "`eval_metric_steps` measures against real images, and a stream of them (`data.streaming`) has no index to "
                "compute statistics with: give `evaluation.reference`, a file of them, or leave `eval_metric_steps` out."
            )
        if not 0 <= self.augment_prob <= 1:
            raise InputError(f"`augment_prob` must lie in [0, 1], got {self.augment_prob}.")
        if self.augment_prob > 0 and self.data.has_references:
            raise InputError(
                f"`augment_prob` is {self.augment_prob}: augmentation would move images and not their references. Take 0."
            )
        if self.profile and self.max_steps < WARM_UP + RECORDED:
            raise InputError(
                f"`profile` records iterations {WARM_UP + 1} to {WARM_UP + RECORDED}, but `max_steps` is {self.max_steps}: "
                f"set it to at least {WARM_UP + RECORDED}."
            )
        self._check_averages()
        if not 0 <= self.t_min < self.t_max <= 1:
            raise InputError(f"Training times need 0 <= t_min < t_max <= 1, got [{self.t_min}, {self.t_max}].")

    def _check_averages(self) -> None:
        if self.ema_halflife_images is not None:
            positive("ema_halflife_images", self.ema_halflife_images)
            at_least("ema_halflife_images", self.ema_halflife_images, 1)
        if self.ema_rampup_ratio is not None:
            positive("ema_rampup_ratio", self.ema_rampup_ratio)
        for value in self.ema_extra:
            if not 0 <= value < float("inf"):
                raise InputError(
                    f"`ema_extra` must hold decays in [0, 1) or half-lives of at least 1 image, got {value}."
                )
        for sigma_rel in self.ema_power_sigmas:
            power_exponent(sigma_rel)
        for name in ("ema_extra", "ema_power_sigmas"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"`{name}` holds a value twice: {values}. Each average needs its own.")
        for name in ("ema_snapshot_steps", "eval_metric_steps"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)

    def check_times(self, interpolant: Interpolant) -> None:
        """Refuses training times at an end where the interpolant's velocity is infinite."""
        for end in interpolant.singular_ends:
            if self.t_min <= end <= self.t_max:
                raise InputError(
                    f"The interpolant {interpolant.name!r} has an infinite velocity at t = {end:g}, but training times "
                    f"are [{self.t_min}, {self.t_max}]: set `{'t_min' if end == 0 else 't_max'}` away from it, e.g. 0.001."
                )

    def build_time_sampler(self, interpolant: Interpolant, timestep_type: str) -> TimeSampler:
        """The law of the training times, of a network that is given `timestep_type` for them."""
        try:
            return TimeSampler(
                self.time_sampler, self.t_min, self.t_max, self.time_mean, self.time_std, interpolant, timestep_type
            )
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass
class TeacherConfig(TrainingConfig):
    """Settings of `training/train_teacher.py`."""

    interpolant: str = setting("linear", "`linear`, `trigonometric`, `vp`, `ddpm`, `edm` or `bridge`.")
    interpolant_kwargs: dict = setting({}, "Settings of the interpolant, e.g. {b0: 0.1, b1: 20}.")
    prediction_type: str = setting("velocity", "What the network predicts.", PREDICTIONS)
    loss_weight: str = setting("none", "SiT's weight of a noise or score network's loss.", LOSS_WEIGHTS)
    timestep_type: str = setting(
        "time",
        "What the network is given for t: t, a step of `ddpm` (discrete), or ln(β/α)/4 (log_sigma).",
        TIMESTEP_TYPES,
    )
    model: dict = setting(
        {}, "The network: `class` (SiTTransformer2DModel when not given), `preset` (e.g. SiT-S/2), and its arguments."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        interpolant = self.build_interpolant()
        if self.prediction_type == "velocity":
            self.check_times(interpolant)
        check_teacher_references(self.data, interpolant, self.prediction_type)
        self.build_time_sampler(interpolant, self.timestep_type)
        if self.prediction_type == "score" and self.t_min == 0:
            raise InputError("The score is infinite at t = 0: set `t_min` above 0 for prediction_type=score.")
        self._check_loss_weight()

    def _check_loss_weight(self) -> None:
        if self.loss_weight == "none":
            return
        if self.prediction_type not in ("epsilon", "score"):
            raise InputError(
                f"`loss_weight` {self.loss_weight!r} is for noise and score networks; with prediction_type="
                f"{self.prediction_type} the loss has its own: leave it at none."
            )
        for name in ("t_min", "t_max"):
            c = self.build_interpolant().coefficients(torch.tensor(getattr(self, name), dtype=torch.float64))
            # cos(π/2) is not quite 0.
            if not regression_weight(self.loss_weight, c, self.prediction_type) < 1e12:
                raise InputError(
                    f"`loss_weight` {self.loss_weight!r} is infinite at `{name}` = {getattr(self, name):g} on the "
                    f"interpolant {self.interpolant!r}: keep away from that end, e.g. by 0.001 (SiT)."
                )

    def build_interpolant(self) -> Interpolant:
        try:
            return get_interpolant(self.interpolant, **self.interpolant_kwargs)
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass
class AdversarialConfig:
    """An adversarial term beside the objective, in the units of its publication (see `si_distill.adversarial`)."""

    kind: str = setting("none", "The term.", ("none", *KINDS))
    critic_weight: float = setting(1.0, "Published factor of the critic's term (SiDA's λ_D).")
    generator_weight: float = setting(0.01, "Published factor of the generator's term (SiDA's λ_G).")
    weights_of_sums: bool = setting(True, "Whether these stand beside sums over a sample's values (SiDA, RealUID).")
    generator_scale: float = setting(1.0, "Published factor of the generator's distillation loss (SiDA: 50).")
    clamp: float | None = setting(None, "Cut of the generator's logits (SiDA: 10).")
    max_grad_value: float | None = setting(None, "Cut of each value of the critic's gradient (SiDA on EDM: 1).")
    t_min: float | None = setting(None, "Smallest time of this term; with t_max; by default the times of the losses.")
    t_max: float | None = setting(None, "Largest time of this term.")
    start_images: int = setting(0, "Generated images before the generator feels the term (SiDA: 200,000).")

    def __post_init__(self) -> None:
        at_least("adversarial.start_images", self.start_images, 0)
        if (self.t_min is None) != (self.t_max is None):
            raise InputError("Set both `adversarial.t_min` and `adversarial.t_max`, or neither.")
        if self.t_min is not None and not 0 <= self.t_min < self.t_max <= 1:
            raise InputError(f"Adversarial times need 0 <= t_min < t_max <= 1, got [{self.t_min}, {self.t_max}].")
        self.build()

    def build(self) -> AdversarialTerm | None:
        """The term, or None."""
        if self.kind == "none":
            return None
        try:
            return AdversarialTerm(
                self.kind,
                self.critic_weight,
                self.generator_weight,
                self.weights_of_sums,
                self.generator_scale,
                self.clamp,
                self.max_grad_value,
            )
        except ValueError as error:
            raise InputError(str(error)) from None

    def build_time_sampler(self, interpolant: Interpolant, timestep_type: str) -> TimeSampler | None:
        """The law of this term's own times, or None when it has the losses'."""
        if self.t_min is None:
            return None
        try:
            return TimeSampler("uniform", self.t_min, self.t_max, interpolant=interpolant, timestep_type=timestep_type)
        except ValueError as error:
            raise InputError(f"Adversarial times: {error}") from None


@dataclass
class DistillConfig(TrainingConfig):
    """Settings of `training/train_distill.py`."""

    teacher: str = setting("", "The teacher: a pipeline folder or a Hub id.")
    teacher_model: dict = setting(
        {},
        "The teacher, for --dry_run without its folder: `class` and arguments as in `model` and `scheduler` with its "
        "settings, or `training` with the file that trains it.",
    )
    objective: str = setting("sid", "A preset of the family, see docs/objectives.md.")
    objective_kwargs: dict = setting({}, "Coefficients, `space` and `weight`, e.g. {alpha: 1.2}.")
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    label_sampling: str | None = setting(
        None,
        "Law of the generated classes; by default those of the real images where a recipe reads them, else uniform.",
        ("uniform", "empirical"),
    )
    class_frequencies: list[float] = setting(
        [], "Shares of the classes for `empirical`, in any unit; by default those of `data`."
    )
    student: str | None = setting(None, "A finished student to start from (SiD²A, fine-tuning): a folder or Hub id.")
    critic_steps: int = setting(1, "Critic updates k per iteration.")
    generator_steps: int = setting(1, "Generator updates per iteration.")
    critic_learning_rate: float | None = setting(None, "The critic's learning rate; `learning_rate` when not given.")
    critic_log_variance: bool = setting(False, "Whether the critic learns its loss's size u(σ) (SiDA on EDM2: true).")
    generator_start_images: int = setting(0, "Images that only the critic learns from at first (SiDA: 100,000).")
    guidance_scale: float = setting(1.0, "Classifier-free guidance of the teacher; 1 is none.")
    critic_guidance_scale: float = setting(1.0, "Guidance of the critic in the generator's loss; 1 is none.")
    critic_class_dropout_prob: float = setting(0.0, "Share of null classes in the critic's training, for its guidance.")
    guidance_t_min: float = setting(0.0, "Smallest time with guidance.")
    guidance_t_max: float = setting(1.0, "Largest time with guidance.")
    noise_channels: int | None = setting(
        None,
        "A bridge student's channels of noise; by default an image's beside a pair's reference, else 0 (no noise).",
    )
    init_time: float | None = setting(None, "Time of the one-step map; by default the interpolant's own.")
    adam_beta1: float = setting(0.0, "First-moment decay of Adam; 0 for the game (SiD, RealUID, the report).")
    t_min: float = setting(0.02, "Smallest time of the losses.")
    t_max: float = setting(0.98, "Largest time of the losses.")
    generator_time_sampler: str | None = setting(
        None,
        "Law of the generator's times, if not the critic's (SiD on EDM: karras, the critic's lognormal).",
        TIME_SAMPLERS,
    )
    generator_t_min: float | None = setting(None, "Smallest time of the generator's loss, if not the critic's.")
    generator_t_max: float | None = setting(
        None, "Largest time of the generator's loss, if not the critic's (SiD: 0.8)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise InputError(
                "`teacher` is not set: give a pipeline folder or a Hub id, e.g. --teacher runs/my-teacher."
            )
        self._check_class_frequencies()
        for name in ("critic_steps", "generator_steps"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: without its updates that side of the "
                    "game stands still. 1 and 5 critic updates are both in use."
                )
        for name in ("t_min", "generator_t_min"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InputError(f"`{name}` must be above 0 when distilling: the loss weights are infinite at t = 0.")
        low, high = self.generator_times
        if not low < high <= 1:
            raise InputError(f"The generator's times need generator_t_min < generator_t_max <= 1, got [{low}, {high}].")
        if self.critic_learning_rate is not None:
            positive("critic_learning_rate", self.critic_learning_rate)
        at_least("generator_start_images", self.generator_start_images, 0)
        if self.noise_channels is not None:
            at_least("noise_channels", self.noise_channels, 0)
        for name in ("guidance_scale", "critic_guidance_scale"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.guidance_t_min < self.guidance_t_max <= 1:
            raise InputError(
                f"Guidance needs 0 <= guidance_t_min < guidance_t_max <= 1, got [{self.guidance_t_min}, "
                f"{self.guidance_t_max}]."
            )
        if not 0 <= self.critic_class_dropout_prob < 1:
            raise InputError(f"`critic_class_dropout_prob` must lie in [0, 1), got {self.critic_class_dropout_prob}.")
        if self.critic_guidance_scale != 1 and self.critic_class_dropout_prob == 0:
            raise InputError(
                f"`critic_guidance_scale` is {self.critic_guidance_scale}, but the critic never learns the null class: "
                "set `critic_class_dropout_prob`, e.g. 0.1."
            )
        if self.init_time is not None and not 0 < self.init_time <= 1:
            raise InputError(f"`init_time` must lie in (0, 1], got {self.init_time}.")
        if Path(self.output_dir).resolve() == Path(self.teacher).resolve():
            raise InputError(
                f"`output_dir` and `teacher` are the same folder {self.teacher}: the student needs its own."
            )
        self.build_objective()

    def _check_class_frequencies(self) -> None:
        shares = self.class_frequencies
        if shares and self.label_sampling != "empirical":
            raise InputError("`class_frequencies` are for label_sampling=empirical: set it, or leave them out.")
        if shares and not (all(0 <= share < float("inf") for share in shares) and any(shares)):
            raise InputError(f"`class_frequencies` must not be negative, and not all 0, got {shares}.")

    @property
    def generator_times(self) -> tuple[float, float]:
        """Ends of the generator's times: its own, or the critic's."""
        return (
            self.t_min if self.generator_t_min is None else self.generator_t_min,
            self.t_max if self.generator_t_max is None else self.generator_t_max,
        )

    def build_generator_time_sampler(self, interpolant: Interpolant, timestep_type: str) -> TimeSampler:
        """The law of the generator's times."""
        low, high = self.generator_times
        own = replace(self, time_sampler=self.generator_time_sampler or self.time_sampler, t_min=low, t_max=high)
        return own.build_time_sampler(interpolant, timestep_type)

    def build_objective(self) -> DistillationObjective:
        try:
            return get_objective(self.objective, **self.objective_kwargs)
        except ValueError as error:
            raise InputError(str(error)) from None
