"""Settings that the training scripts share, and those of `training/train_teacher.py`: dataclasses, read from YAML and
`--key value`, that refuse what cannot work.

Names are those of transformers' `TrainingArguments` where it has them.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..choices import LOSS_WEIGHTS, TIME_SAMPLERS
from ..data.config import DataConfig
from ..errors import InputError
from ..evaluation.config import MEASURED, MeasurementConfig
from ..schedulers.interpolant_names import PREDICTIONS, TIMESTEP_TYPES
from ..settings import LARGEST_SEED, MOST_PROCESSES, MOST_SAMPLES, at_least, positive, setting
from ..text_to_image.config import TextConfig

if TYPE_CHECKING:
    from ..interpolants import Interpolant
    from .times import TimeSampler

#: Iterations of a start that `profile` records: after allocation, compilation and tuning.
PROFILED = range(4, 7)
#: The best pipeline of a run by a metric, and the measurements, in the run's folder.
BEST, EVALUATIONS = "best", "evaluations.jsonl"


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
    weight_decay: float = setting(0.0, "Decoupled weight decay (AdamW); 0 is Adam.")
    use_8bit_adam: bool = setting(
        False,
        "Keep Adam's moments in 8 bits: 2 bytes for each trained parameter instead of 8. Needs bitsandbytes; not with "
        "FSDP2.",
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this global norm.")
    augment_prob: float = setting(
        0.0, "Probability of each labelled augmentation; 0 is none. EDM: 0.12 (CIFAR-10), 0.15 (FFHQ, AFHQv2)."
    )
    ema_decay: float = setting(0.999, "Decay of the weights' moving average; 0 is no average.")
    ema_warmup: bool = setting(
        True, "Whether constant decays are warmed up as (1 + n) / (10 + n) after n updates (RealUID: false)."
    )
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
    time_sampler: str = setting("uniform", "Distribution of the training times t, or of σ = β/α.", TIME_SAMPLERS)
    t_min: float = setting(0.0, "Smallest training time.")
    t_max: float = setting(1.0, "Largest training time.")
    time_mean: float = setting(0.0, "Mean of logit(t) for `logit_normal`, of ln σ for `lognormal` (EDM: -1.2).")
    time_std: float = setting(1.0, "Standard deviation of the same (EDM: 1.2).")
    time_steps: int | None = setting(
        None,
        "Uniform times are drawn from this many equally spaced ones of [0, 1] (DMD2: 1,000); from all when not given.",
    )
    mixed_precision: str = setting("no", "`bf16` runs networks in bfloat16; losses stay in float32.", ("no", "bf16"))
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, longer iterations, identical results."
    )
    compile: bool = setting(False, "Compile the networks' repeated blocks by torch.compile.")
    dataloader_num_workers: int = setting(0, "Processes that read images, per device.")
    logging_steps: int = setting(50, "Iterations between lines of metrics.jsonl.")
    eval_steps: int = setting(500, "Iterations between sample grids in samples/.")
    eval_metric_steps: int | None = setting(
        None, "Iterations between measurements of the pipeline; off when not given."
    )
    metric_for_best_model: str = setting(
        "frechet_distance",
        "The pipeline with the best value, the largest of a score, is kept in best/; scores are of images of prompts.",
        tuple(MEASURED),
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
    dry_run: bool = setting(False, "Print what the run would need and do; load no weights or images and write nothing.")
    algorithm: int | None = setting(
        None, "Version of the training algorithm that a run was started with; written to its config.yaml."
    )
    run_id: str | None = setting(
        None, "Identity of a run, drawn when it starts and written to its config.yaml; what is given here is not used."
    )
    profile: bool = setting(
        False, "Record the fourth to sixth iteration of this start: a trace and a table in profile/."
    )

    #: What may change when a run is resumed; everything else decides the trajectory. The batch may be cut otherwise as
    #: long as an update keeps its number of images, which the checkpoint knows.
    RESUMABLE = frozenset(
        "output_dir max_steps logging_steps eval_steps save_steps save_total_limit report_to resume_from_checkpoint "
        "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing "
        "overwrite_output_dir dataloader_num_workers ema_snapshot_steps eval_metric_steps metric_for_best_model evaluation "
        "push_to_hub hub_model_id hub_private_repo dry_run profile run_id teacher_model trust_remote_code "
        "data.max_corrupt_images".split()
    )

    #: Counted up whenever the same settings begin to give other updates, with what changed since the version before.
    ALGORITHM: ClassVar[int] = 1
    ALGORITHM_CHANGES: ClassVar[dict[int, str]] = {}

    def __post_init__(self) -> None:
        self.algorithm = self.ALGORITHM if self.algorithm is None else self.algorithm
        if self.algorithm != self.ALGORITHM:
            raise InputError(
                f"These are the settings of a run of another version: {self.other_algorithm(self.algorithm)}"
            )
        if not self.output_dir:
            raise InputError("`output_dir` is not set: give the folder of the run, e.g. --output_dir runs/my-run.")
        if self.push_to_hub and not self.hub_model_id:
            raise InputError("`push_to_hub` is set, but `hub_model_id` is not: give the repository, user/name.")
        for name in "max_steps logging_steps eval_steps save_steps save_total_limit".split():
            at_least(name, getattr(self, name), 1)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            at_least(name, getattr(self, name), 1, MOST_SAMPLES)
        at_least("seed", self.seed, 0, LARGEST_SEED)
        at_least("dataloader_num_workers", self.dataloader_num_workers, 0, MOST_PROCESSES)
        positive("time_std", self.time_std)
        names = "learning_rate lr_warmup_steps adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm"
        self.check_optimizer({name: getattr(self, name) for name in names.split()})
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        if not 0 <= self.augment_prob <= 1:
            raise InputError(f"`augment_prob` must lie in [0, 1], got {self.augment_prob}.")
        if self.augment_prob > 0 and self.data.has_references:
            raise InputError(
                f"`augment_prob` is {self.augment_prob}: augmentation would move images and not their references. Take 0."
            )
        if self.profile and self.max_steps < PROFILED[-1]:
            raise InputError(
                f"`profile` records iterations {PROFILED[0]} to {PROFILED[-1]}, but `max_steps` is {self.max_steps}: "
                f"set it to at least {PROFILED[-1]}."
            )
        self._check_averages()
        if self.time_steps is not None:
            at_least("time_steps", self.time_steps, 2)
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
        if self.ema_power_sigmas:
            from .averaging.posthoc import power_exponent

            for sigma_rel in self.ema_power_sigmas:
                power_exponent(sigma_rel)
        for name in ("ema_extra", "ema_power_sigmas"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"`{name}` holds a value twice: {values}. Each average needs its own.")
        for name in ("ema_snapshot_steps", "eval_metric_steps"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)

    def check_times(self, interpolant: "Interpolant") -> None:
        """Refuses training times at an end where the interpolant's velocity is infinite."""
        for end in interpolant.singular_ends:
            if self.t_min <= end <= self.t_max:
                raise InputError(
                    f"The interpolant {interpolant.name!r} has an infinite velocity at t = {end:g}, but training times "
                    f"are [{self.t_min}, {self.t_max}]: set `{'t_min' if end == 0 else 't_max'}` away from it, e.g. 0.001."
                )

    def other_algorithm(self, version: int) -> str:
        """Explains why a run started under another version cannot be resumed under this one."""
        newer = sorted(number for number in self.ALGORITHM_CHANGES if number > version)
        changes = "; ".join(f"since version {number}, {self.ALGORITHM_CHANGES[number]}" for number in newer)
        return (
            f"it was started under version {version} of the training algorithm, and this is version {self.ALGORITHM}, "
            f"under which the same settings give other updates{f' ({changes})' if changes else ''}. Start a new run, "
            "without `algorithm` in its settings, or finish this one with the release that started it."
        )

    @staticmethod
    def check_optimizer(values: dict[str, Any], prefix: str = "") -> None:
        """Refuses an optimizer's settings out of range, by their names after the prefix."""
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            positive(prefix + name, values[name])
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= values[name] < 1:
                raise InputError(f"`{prefix}{name}` must lie in [0, 1), got {values[name]}.")
        at_least(f"{prefix}lr_warmup_steps", values["lr_warmup_steps"], 0)
        if not 0 <= values["weight_decay"] < float("inf"):
            raise InputError(f"`{prefix}weight_decay` must be finite and not negative, got {values['weight_decay']}.")

    def build_time_sampler(self, interpolant: "Interpolant", timestep_type: str) -> "TimeSampler":
        """The distribution of the training times, for a network that is given `timestep_type` for them."""
        return self._time_sampler(self.time_sampler, self.t_min, self.t_max, interpolant, timestep_type)

    def _time_sampler(
        self, name: str, low: float, high: float, interpolant: "Interpolant", timestep_type: str
    ) -> "TimeSampler":
        from .times import TimeSampler

        try:
            return TimeSampler(
                name, low, high, self.time_mean, self.time_std, interpolant, timestep_type, self.time_steps
            )
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass
class TeacherConfig(TrainingConfig):
    """Settings of `training/train_teacher.py`."""

    interpolant: str = setting(
        "linear", "A registered family, e.g. `linear`, `trigonometric`, `vp`, `ddpm`, `edm` or `bridge`."
    )
    interpolant_kwargs: dict = setting({}, "Settings of the interpolant, e.g. {b0: 0.1, b1: 20}.")
    prediction_type: str = setting("velocity", "What the network predicts.", PREDICTIONS)
    loss_weight: str = setting("none", "SiT's weight of a noise or score network's loss.", LOSS_WEIGHTS)
    timestep_type: str = setting(
        "time",
        "What the network is given for t: t, a step of `ddpm` (discrete), or ln(β/α)/4 (log_sigma).",
        TIMESTEP_TYPES,
    )
    model: dict = setting(
        {},
        "The network: `class` (SiTTransformer2DModel when not given), `preset` (e.g. SiT-S/2), and its arguments; or "
        "`pipeline`, the folder or repository of a text-to-image pipeline of diffusers to train further.",
    )
    model_class: str | None = setting(
        None, "A network class of your own instead of `model.class`: package.module:Class.", names_code=True
    )

    text: TextConfig = field(default_factory=TextConfig)
    caption_dropout_prob: float = setting(
        0.1, "Share of the captions that are left out in training, which guidance needs; for `model.pipeline`."
    )
    lora_rank: int | None = setting(
        None,
        "Train a low-rank adapter (LoRA) of this rank on the pipeline's network; all of its weights when not given.",
    )
    lora_targets: list[str] = setting(
        [], "Ends of the names of the layers that it changes; those usual for the pipeline when empty."
    )

    #: Settings that `model.pipeline` says itself, and what there is only for the networks that are built here.
    OF_OWN_NETWORKS: ClassVar[tuple[str, ...]] = (
        *("interpolant", "interpolant_kwargs", "prediction_type", "loss_weight", "timestep_type", "model_class"),
        *("augment_prob", "push_to_hub"),
    )
    #: Settings of `text` that say nothing of captions and images.
    OF_DISTILLATION: ClassVar[tuple[str, ...]] = ("negative_prompt", "told_guidance", "max_texts_in_memory")

    ALGORITHM = 2
    ALGORITHM_CHANGES = {2: "augmented images are mirrored about the centres of the outermost pixels"}

    def __post_init__(self) -> None:
        from .teacher_references import check_teacher_references

        super().__post_init__()
        self._check_text_to_image()
        if self.model_class and "class" in self.model:
            raise InputError(
                f"`model_class` is {self.model_class!r} and `model.class` {self.model['class']!r}: leave one of them out."
            )
        interpolant = self.build_interpolant()
        if self.prediction_type == "velocity":
            self.check_times(interpolant)
        check_teacher_references(self.data, interpolant, self.prediction_type)
        self.build_time_sampler(interpolant, self.timestep_type)
        if self.prediction_type == "score" and self.t_min == 0:
            raise InputError("The score is infinite at t = 0: set `t_min` above 0 for prediction_type=score.")
        self._check_loss_weight()

    @property
    def is_text_to_image(self) -> bool:
        """Whether what is trained is a text-to-image pipeline of diffusers."""
        return "pipeline" in self.model

    def _check_text_to_image(self) -> None:
        if not 0 <= self.caption_dropout_prob < 1:
            raise InputError(f"`caption_dropout_prob` must lie in [0, 1), got {self.caption_dropout_prob}.")
        if self.lora_rank is not None:
            at_least("lora_rank", self.lora_rank, 1)
        if not self.is_text_to_image:
            given = {"lora_rank": self.lora_rank, "lora_targets": self.lora_targets, "text": self.text != TextConfig()}
            for name, value in given.items():
                if value:
                    raise InputError(
                        f"`{name}` is for the network of a text-to-image pipeline: give `model.pipeline`, or leave it out."
                    )
            if self.data.caption_column is not None:
                raise InputError(
                    "`data.caption_column` is set, but only text-to-image pipelines learn from captions: give "
                    "`model.pipeline`, or take `data.label_column`."
                )
            return
        if not isinstance(self.model["pipeline"], str):
            raise InputError(f"`model.pipeline` must be a folder or repository, got {self.model['pipeline']!r}.")
        if len(self.model) > 1:
            others = ", ".join(f"`model.{name}`" for name in self.model if name != "pipeline")
            raise InputError(f"`model.pipeline` brings its network with it: leave {others} out.")
        if self.data.caption_column is None:
            raise InputError("A text-to-image pipeline learns from captions: set `data.caption_column`.")
        if self.data.has_references:
            raise InputError("Text-to-image pipelines see no references: leave those of `data` out.")
        if self.lora_targets and self.lora_rank is None:
            raise InputError("`lora_targets` are set without a `lora_rank`: give one, or leave them out.")
        for name in self.OF_DISTILLATION:
            if (value := getattr(self.text, name)) != getattr(TextConfig, name):
                raise InputError(
                    f"`text.{name}` is {value!r}, which is for distillation (`si-distill train-distill`): leave it out."
                )
        for setting_field in fields(self):
            name, factory = setting_field.name, setting_field.default_factory
            default = factory() if callable(factory) else setting_field.default
            if name in self.OF_OWN_NETWORKS and getattr(self, name) != default:
                raise InputError(
                    f"`{name}` is {getattr(self, name)!r}, which cannot be set with `model.pipeline`: leave it out."
                )

    def _check_loss_weight(self) -> None:
        if self.loss_weight == "none":
            return
        if self.prediction_type not in ("epsilon", "score"):
            raise InputError(
                f"`loss_weight` {self.loss_weight!r} is for noise and score networks; with prediction_type="
                f"{self.prediction_type} the loss has its own: leave it at none."
            )
        import torch

        from .loss_weights import regression_weight

        for name in ("t_min", "t_max"):
            c = self.build_interpolant().coefficients(torch.tensor(getattr(self, name), dtype=torch.float64))
            # cos(π/2) is not quite 0.
            if not regression_weight(self.loss_weight, c, self.prediction_type) < 1e12:
                raise InputError(
                    f"`loss_weight` {self.loss_weight!r} is infinite at `{name}` = {getattr(self, name):g} on the "
                    f"interpolant {self.interpolant!r}: keep away from that end, e.g. by 0.001 (SiT)."
                )

    def build_interpolant(self) -> "Interpolant":
        from ..interpolants import get_interpolant
        from ..schedulers.interpolant_solvers import check_determinant

        try:
            interpolant = get_interpolant(self.interpolant, **self.interpolant_kwargs)
            check_determinant(interpolant)
            return interpolant
        except ValueError as error:
            raise InputError(str(error)) from None
