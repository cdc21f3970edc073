"""Settings of the terms that a distillation may have next to its objective."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...choices import ADVERSARIAL_COMBINATIONS, ADVERSARIAL_HEADS, ADVERSARIAL_KINDS
from ...errors import InputError
from ...settings import at_least, positive, setting

if TYPE_CHECKING:
    from ...adversarial import AdversarialTerm

#: Where the paths of the flow-map term start.
FLOW_MAP_STARTS = ("prior", "both")


def check_guidance_times(what: str, low: float, high: float) -> None:
    """Refuses an interval of guidance that is empty, or not in [0, 1]."""
    if not 0 <= low < high <= 1:
        raise InputError(f"{what} needs 0 <= guidance_t_min < guidance_t_max <= 1, got [{low}, {high}].")


@dataclass
class AdversarialConfig:
    """An adversarial term next to the objective, with the factors of its publication (see `si_distill.adversarial`)."""

    kind: str = setting("none", "The term.", ("none", *ADVERSARIAL_KINDS))
    head: str = setting("mlp", "Network that turns features into logits, for kind=head.", ADVERSARIAL_HEADS)
    features: str = setting(
        "critic", "Network whose features the head reads (FastGen: teacher).", ("critic", "teacher")
    )
    critic_weight: float = setting(1.0, "Factor of the critic's term (SiDA's λ_D).")
    generator_weight: float = setting(0.01, "Factor of the generator's term (SiDA's λ_G).")
    combine: str = setting(
        "sum",
        "Whether the generator minimises the sum of its two losses or, as SiDA's code does, their mean.",
        ADVERSARIAL_COMBINATIONS,
    )
    clamp: float | None = setting(None, "The generator's logits are cut to ± this (SiDA: 10).")
    max_grad_value: float | None = setting(
        None, "Each value of the critic's gradient is cut to ± this (SiDA on EDM: 1)."
    )
    t_min: float | None = setting(None, "Smallest time of this term; with t_max; by default the times of the losses.")
    t_max: float | None = setting(None, "Largest time of this term.")
    own_noise: bool = setting(False, "Whether this term draws noise of its own (DMD2: true).")
    real_apart: bool = setting(
        False, "Whether real images get times and noise of their own (DMD2, FastGen: true) or those of generated ones."
    )
    shared_augmentation: bool = setting(
        True, "Whether real images are augmented as the generated ones in their place, or apart (SiDA: false)."
    )
    start_images: int = setting(0, "Generated images before the term is added to the generator's loss (SiDA: 200,000).")

    def __post_init__(self) -> None:
        at_least("adversarial.start_images", self.start_images, 0)
        if (self.t_min is None) != (self.t_max is None):
            raise InputError("Set both `adversarial.t_min` and `adversarial.t_max`, or neither.")
        if self.t_min is not None and not 0 <= self.t_min < self.t_max <= 1:
            raise InputError(f"Adversarial times need 0 <= t_min < t_max <= 1, got [{self.t_min}, {self.t_max}].")
        if self.max_grad_value is not None:
            positive("adversarial.max_grad_value", self.max_grad_value)
        if self.features == "teacher" and self.kind != "head":
            raise InputError(
                f"`adversarial.features` is teacher, but `adversarial.kind` is {self.kind!r}: the teacher is frozen, so its "
                "features need a head to be trained. Set kind to head, or features to critic."
            )
        self.build()

    def build(self) -> "AdversarialTerm | None":
        """The term, or None."""
        if self.kind == "none":
            return None
        from ...adversarial import AdversarialTerm

        try:
            return AdversarialTerm(self.kind, self.critic_weight, self.generator_weight, self.combine, self.clamp)
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass
class FlowMapConfig:
    """The flow-map term next to the objective (see `si_distill.training.distillation.flow_map`)."""

    weight: float = setting(
        0.0, "Size of the term's gradient at the student's images, relative to the objective's; 0 is no term."
    )
    decay: float = setting(
        1.0, "Power of the mean squared residual that each image's residual is divided by (FreeFlow: 1)."
    )
    batch_share: float = setting(
        0.5, "Share of a student update's images that are the term's (FreeFlow: 0.75); the objective keeps its batch."
    )
    step_size: float = setting(0.005, "Step in time of the finite difference (FreeFlow: 0.005).")
    starts: str = setting(
        "prior",
        "Where the term's paths start: at the student's noise (FreeFlow), or half of them at its noised images.",
        FLOW_MAP_STARTS,
    )
    guidance_t_min: float = setting(0.0, "Smallest time at which the teacher is guided in this term.")
    guidance_t_max: float = setting(1.0, "Largest time at which the teacher is guided in this term.")

    def __post_init__(self) -> None:
        for name in ("weight", "decay"):
            at_least(f"flow_map.{name}", getattr(self, name), 0)
        for name in ("batch_share", "step_size"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"`flow_map.{name}` must lie between 0 and 1, got {getattr(self, name)}.")
        check_guidance_times("Guidance of the flow-map term", self.guidance_t_min, self.guidance_t_max)

    @property
    def ratio(self) -> float:
        """Images of the term for each of the objective's."""
        return self.batch_share / (1 - self.batch_share)
