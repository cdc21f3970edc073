"""Settings of `training/train_distill.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...choices import TIME_SAMPLERS
from ...errors import InputError
from ...schedulers.interpolant_solvers import STUDENT_STEPPINGS, check_levels
from ...settings import TRUST, at_least, positive, setting
from ...text_to_image.config import TextConfig
from ..config import TrainingConfig
from .terms import AdversarialConfig, FlowMapConfig, check_guidance_times

if TYPE_CHECKING:
    from ...interpolants import Interpolant
    from ...objectives import DistillationObjective
    from ..times import TimeSampler

#: Where the critic starts from, if it is not the folder of another run.
CRITIC_STARTS = ("teacher", "random")
#: What the student makes of its network's prediction (see `Interpolant.one_step`).
STUDENT_MAPS = ("sample", "negative_velocity")


@dataclass
class DistillConfig(TrainingConfig):
    """Settings of `training/train_distill.py`."""

    teacher: str = setting("", "The teacher: a pipeline folder or a Hub id.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    teacher_model: dict = setting(
        {},
        "The teacher, for --dry_run without its folder: `class` and arguments as in `model` and `scheduler` with its "
        "settings, or `training` with the file that trains it.",
    )
    lora_rank: int | None = setting(
        None,
        "Text-to-image: student and critic are adapters of this rank on the teacher's network; whole networks when not "
        "given.",
    )
    lora_targets: list[str] = setting(
        [], "Ends of the names of the layers with adapters; by default the pipeline's own."
    )
    text: TextConfig = field(default_factory=TextConfig)
    objective: str = setting("sid", "A preset of the family, see docs/objectives.md.")
    objective_kwargs: dict = setting(
        {},
        "Coefficients, `space`, `weight` and `critic_weight`, e.g. {alpha: 1.2}.",
        kept=("space", "weight", "critic_weight"),
    )
    loss_reduction: str = setting(
        "mean", "Over the values of a sample, in the student's loss (SiD, RealUID: sum).", ("mean", "sum")
    )
    critic_loss_reduction: str | None = setting(
        None, "The same in the critic's loss; `loss_reduction` when not given.", ("mean", "sum")
    )
    loss_scale: float = setting(1.0, "Factor of the student's objective (SiD: 50, for its loss is half of ours × 100).")
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    label_sampling: str | None = setting(
        None,
        "Distribution of the generated classes; by default that of the real images where a recipe reads them, else uniform.",
        ("uniform", "empirical"),
    )
    class_frequencies: list[float] = setting(
        [], "Shares of the classes for `empirical`, in any unit; by default those of `data`."
    )
    student: str | None = setting(None, "A finished student to start from (SiD²A, fine-tuning): a folder or Hub id.")
    critic_start: str = setting(
        "teacher", "Weights that the critic starts from: `teacher`, `random` (RealUID), or a run folder (its critic)."
    )
    critic_steps: int = setting(1, "Critic updates k per iteration.")
    generator_steps: int = setting(1, "Student updates per iteration.")
    critic_draws: str = setting(
        "shared",
        "Whether all updates of an iteration share noise, classes and real images, or each draws its own (SiD, RealUID).",
        ("shared", "fresh"),
    )
    generator_first: bool = setting(
        False, "Whether the student is updated before the critic, which then starts with the same images (DMD2)."
    )
    critic_learning_rate: float | None = setting(None, "The critic's learning rate; `learning_rate` when not given.")
    critic_lr_warmup_steps: int | None = setting(None, "Its warm-up; `lr_warmup_steps` when not given.")
    critic_adam_beta1: float | None = setting(None, "Its first-moment decay; `adam_beta1` when not given.")
    critic_adam_beta2: float | None = setting(None, "Its second-moment decay; `adam_beta2` when not given.")
    critic_adam_epsilon: float | None = setting(None, "Its Adam epsilon; `adam_epsilon` when not given.")
    critic_weight_decay: float | None = setting(None, "Its weight decay; `weight_decay` when not given.")
    critic_max_grad_norm: float | None = setting(
        None, "Its limit of the gradient norm; `max_grad_norm` when not given."
    )
    dropout: float | None = setting(None, "Dropout of the student while it is updated; the teacher's when not given.")
    critic_dropout: float | None = setting(None, "Dropout of the critic while it is updated; likewise.")
    forced_weight_normalization: bool = setting(
        True, "Whether EDM2's networks normalise their stored weights in training (SiDA on EDM2-S: false)."
    )
    critic_log_variance: bool = setting(
        False, "Whether the critic learns its loss's size u(σ), from the teacher's own if its folder has it (EDM2)."
    )
    generator_start_images: int = setting(0, "Images that only the critic learns from at first (SiDA: 100,000).")
    guidance_scale: float = setting(1.0, "Classifier-free guidance of the teacher; 1 is none.")
    critic_guidance_scale: float = setting(1.0, "Guidance of the critic in the student's loss; 1 is none.")
    critic_training_guidance_scale: float = setting(
        1.0, "Guidance of the critic in its own loss (long-short guidance, SiD-LSG); 1 is none."
    )
    critic_class_dropout_prob: float = setting(0.0, "Share of null classes in the critic's training, for its guidance.")
    guidance_t_min: float = setting(0.0, "Smallest time with guidance.")
    guidance_t_max: float = setting(1.0, "Largest time with guidance.")
    student_guidance_scale: float = setting(
        1.0, "Guidance inside the student itself, which then takes two evaluations (si-adistill: 4); 1 is none."
    )
    student_guidance_channels: int | None = setting(
        None, "Channels of the student's prediction that are guided (si-adistill: 3); all when not given."
    )
    student_class_dropout_prob: float = setting(
        0.0, "Share of null classes that the student is told while it is updated (si-adistill: 0.1)."
    )
    student_map: str | None = setting(
        None,
        "The student's image: x̂0 of β x1 (`sample`, the default), or −v of x1 itself (public si-adistill).",
        STUDENT_MAPS,
    )
    student_steps: list[int] = setting([1], "Numbers of steps that the student learns to sample with, e.g. 4 or 1 2 4.")
    student_stepping: str = setting(
        "renoise", "From level to level of several steps: fresh noise on x̂0, or DDIM's step.", STUDENT_STEPPINGS
    )
    student_shift: float = setting(1.0, "Shift of the levels towards noise (SD3's s); 1 is none, equal steps.")
    critic_sees_level: bool = setting(False, "Whether the critic is told the level of the student's image.")
    learned_positions: bool = setting(
        False, "Train the position embeddings of student and critic too (public si-adistill)."
    )
    noise_channels: int | None = setting(
        None,
        "A bridge student's channels of noise; by default an image's next to a pair's reference, else 0 (no noise).",
    )
    init_time: float | None = setting(None, "Time of the one-step map; by default the interpolant's own.")
    adam_beta1: float = setting(0.0, "First-moment decay of Adam; 0 for min-max training (SiD, RealUID).")
    t_min: float = setting(0.02, "Smallest time of the losses.")
    t_max: float = setting(0.98, "Largest time of the losses.")
    generator_time_sampler: str | None = setting(
        None,
        "Distribution of the student's times, if not the critic's (SiD on EDM: karras, the critic's lognormal).",
        TIME_SAMPLERS,
    )
    generator_t_min: float | None = setting(None, "Smallest time of the student's loss, if not the critic's.")
    generator_t_max: float | None = setting(None, "Largest time of the student's loss, if not the critic's (SiD: 0.8).")

    ALGORITHM = 2
    ALGORITHM_CHANGES = {
        2: "networks that are not being updated are in evaluation mode (without dropout); the factors of adversarial terms, "
        "clipping and Adam's epsilon apply to losses in published units (`loss_reduction`, `loss_scale`); augmented images "
        "are mirrored about the centres of the outermost pixels"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise InputError(
                "`teacher` is not set: give a pipeline folder or a Hub id, e.g. --teacher runs/my-teacher."
            )
        if self.lora_rank is not None:
            at_least("lora_rank", self.lora_rank, 1)
        elif self.lora_targets:
            raise InputError(
                "`lora_targets` are the layers of adapters: set `lora_rank`, e.g. to 64, or leave them out."
            )
        self._check_updates()
        self._check_guidance()
        self._check_times()
        output = Path(self.output_dir).resolve()
        for name in ("teacher", "student"):
            given = Path(getattr(self, name) or self.teacher).resolve()
            if output in (given, *given.parents):
                raise InputError(
                    f"`output_dir` and `{name}` are the same folder {self.output_dir}, or one is in the other: the student "
                    "needs its own, which a new run may delete."
                )
        self.build_objective()

    def _check_updates(self) -> None:
        shares = self.class_frequencies
        if shares and self.label_sampling != "empirical":
            raise InputError("`class_frequencies` are for label_sampling=empirical: set it, or leave them out.")
        if shares and not (all(0 <= share < float("inf") for share in shares) and any(shares)):
            raise InputError(f"`class_frequencies` must not be negative, and not all 0, got {shares}.")
        for name in ("critic_steps", "generator_steps"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: without its updates that side of the "
                    "game stands still. 1 and 5 critic updates are both in use."
                )
        positive("loss_scale", self.loss_scale)
        self.check_optimizer(self.of_critic(), "critic_")
        for name in ("dropout", "critic_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"`{name}` must lie in [0, 1), got {value}.")
        at_least("generator_start_images", self.generator_start_images, 0)
        if self.noise_channels is not None:
            at_least("noise_channels", self.noise_channels, 0)
        self._check_levels()

    def _check_levels(self) -> None:
        try:
            check_levels(self.student_steps, self.student_shift)
        except ValueError as error:
            raise InputError(str(error).replace("timestep_shift", "student_shift")) from None
        at_least("student_steps", self.student_steps[-1], 1, 1000)
        several = ("student_stepping", "renoise"), ("student_shift", 1.0), ("critic_sees_level", False)
        given = [f"{name}={getattr(self, name)}" for name, default in several if getattr(self, name) != default]
        if given and self.student_steps == [1]:
            raise InputError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for a student of several steps: set "
                "`student_steps`, e.g. to 1 2 4."
            )

    def _check_guidance(self) -> None:
        scales = "guidance_scale critic_guidance_scale critic_training_guidance_scale student_guidance_scale"
        for name in scales.split():
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"`{name}` must be finite and not negative, got {getattr(self, name)}.")
        check_guidance_times("Guidance", self.guidance_t_min, self.guidance_t_max)
        for name in ("critic_class_dropout_prob", "student_class_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        learns_null = self.critic_class_dropout_prob > 0 or self.critic_training_guidance_scale != 1
        if self.critic_guidance_scale != 1 and not learns_null:
            raise InputError(
                f"`critic_guidance_scale` is {self.critic_guidance_scale}, but the critic never learns the null class: "
                "set `critic_class_dropout_prob`, e.g. 0.1, or `critic_training_guidance_scale`."
            )
        if self.student_guidance_channels is not None:
            at_least("student_guidance_channels", self.student_guidance_channels, 1)
            if self.student_guidance_scale == 1:
                raise InputError(
                    f"`student_guidance_channels` is {self.student_guidance_channels}, but the student is not guided: set "
                    "`student_guidance_scale`, or leave it out."
                )

    def check_times(self, interpolant: "Interpolant") -> None:
        import torch

        super().check_times(interpolant)
        objective, low = self.build_objective(), min(self.t_min, self.generator_times[0])
        beta = interpolant.coefficients(torch.tensor(low, dtype=torch.float64)).beta
        if float(beta) == 0 and not objective.finite_at_zero:
            raise InputError(
                f"The times of both losses must be above 0 for the objective {self.objective!r} (space {objective.space}, "
                f"weights {objective.weight} and {objective.critic_weight}): its weights are infinite at t = 0. Set `t_min` "
                "and `generator_t_min`, e.g. to 0.0001."
            )

    def _check_times(self) -> None:
        low, high = self.generator_times
        if not low < high <= 1:
            raise InputError(f"The generator's times need generator_t_min < generator_t_max <= 1, got [{low}, {high}].")
        if low < 0:
            raise InputError(f"The generator's times need generator_t_min of at least 0, got {low}.")
        if self.init_time is not None and not 0 < self.init_time <= 1:
            raise InputError(f"`init_time` must lie in (0, 1], got {self.init_time}.")

    def of_critic(self) -> dict[str, Any]:
        """The critic's own value of each setting of an optimizer, or the student's."""
        names = (
            "learning_rate lr_warmup_steps adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm loss_reduction"
        )
        own = {name: getattr(self, f"critic_{name}") for name in names.split()}
        return {name: getattr(self, name) if value is None else value for name, value in own.items()}

    @property
    def draws_per_iteration(self) -> int:
        """Sets of noise, classes and real images that an iteration draws."""
        if self.critic_draws == "shared":
            return 1
        return self.critic_steps + self.generator_steps - self.generator_first

    @property
    def generator_times(self) -> tuple[float, float]:
        """Ends of the generator's times: its own, or the critic's."""
        return (
            self.t_min if self.generator_t_min is None else self.generator_t_min,
            self.t_max if self.generator_t_max is None else self.generator_t_max,
        )

    def build_generator_time_sampler(self, interpolant: "Interpolant", timestep_type: str) -> "TimeSampler":
        """The distribution of the generator's times."""
        name = self.generator_time_sampler or self.time_sampler
        return self._time_sampler(name, *self.generator_times, interpolant, timestep_type)

    def build_adversarial_time_sampler(self, interpolant: "Interpolant", timestep_type: str) -> "TimeSampler | None":
        """The distribution of the adversarial term's own times, or None when it has the losses'."""
        low, high = self.adversarial.t_min, self.adversarial.t_max
        if low is None or high is None:
            return None
        try:
            return self._time_sampler("uniform", low, high, interpolant, timestep_type)
        except InputError as error:
            raise InputError(f"Adversarial times: {error}") from None

    def build_objective(self) -> "DistillationObjective":
        from ...objectives import get_objective

        try:
            return get_objective(self.objective, **self.objective_kwargs)
        except ValueError as error:
            raise InputError(str(error)) from None
