"""The one family of min-max distillation losses, and the presets that the literature knows under many names.

With the frozen teacher v*, the critic v_ψ (a model of the student's samples), Δ = v_ψ − v* at (x_t, t), and the
conditional velocity İ of the sample behind x_t,

    ℓ(x; a, b, c) = 2b ⟨Δ, İ⟩ − 2a ⟨Δ, v*⟩ − c ‖Δ‖²

    critic     max over ψ:  E_gen ℓ(x; a, b, c) + E_data ℓ(x; 1−a, 1−b, 1−c)
    generator  min over θ:  E_gen ℓ(x; a_G, b_G, c_G)

⟨·,·⟩ and ‖·‖² are per-sample MEANS over all axes but the first, so that learning rates carry over between image sizes.
All three arguments may be given as velocities or as x̂0-predictions (`space`); the target is then İ or x0. Only torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .interpolants import Interpolant
from .schedulers.interpolant_names import build_named

SPACES = ("velocity", "sample")
GENERATOR_WEIGHTS = ("uniform", "sid")
CRITIC_WEIGHTS = ("uniform", "sample", "edm")
PARAMETRIZATIONS = ("standard", "beta")
#: Floor of the mean distance in the `sid` weight (SiD's code uses the same order of magnitude).
SID_WEIGHT_FLOOR = 1e-5

Triple = tuple[float, float, float]
Fields = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def interpolant_gap(
    critic: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    a: float = 1.0,
    b: float = 1.0,
    c: float = 1.0,
) -> torch.Tensor:
    """ℓ(x; a, b, c) = 2b ⟨Δ, İ⟩ − 2a ⟨Δ, v*⟩ − c ‖Δ‖², Δ = v_ψ − v*.

    At a = b = c = 1 it equals ‖v* − İ‖² − ‖v_ψ − İ‖², the interpolant generalisation gap (report, eq. 4; RealUID's
    UID loss).

    Args:
        critic, teacher, target: v_ψ, v* and İ of shape (B, …), all three in the same space.
        a, b, c: coefficients of the family.

    Returns:
        (B,) values, means over all axes but the first.

    Raises:
        ValueError: when the shapes differ (broadcasting would hide a mistake).
    """
    if not critic.shape == teacher.shape == target.shape:
        raise ValueError(
            f"critic {tuple(critic.shape)}, teacher {tuple(teacher.shape)} and target {tuple(target.shape)} "
            "must have one shape."
        )
    delta = critic - teacher
    return (2 * b * delta * target - 2 * a * delta * teacher - c * delta**2).flatten(1).mean(1)


def sid_weight(sample: torch.Tensor, teacher_sample: torch.Tensor) -> torch.Tensor:
    """1 / mean|x_g − x̂0*| per sample, (B,), without gradient: SiD's weight of a loss in sample space."""
    with torch.no_grad():
        return 1 / (sample - teacher_sample).abs().flatten(1).mean(1).clamp(min=SID_WEIGHT_FLOOR)


@dataclass(frozen=True)
class DistillationObjective:
    """One member of the family: what the critic and the generator minimise, and in which space and weight.

    Args:
        name: the preset's name.
        critic: (a, b, c) of the critic's game.
        generator: (a_G, b_G, c_G) of the generator's loss.
        detach: whether the generator's gradient stops at v* and v_ψ and only flows through the target.
        space: `"velocity"` or `"sample"`: what `critic_loss` and `generator_loss` are given. For a = b the two spaces
            differ by the factor κ² alone, which the weight undoes; for a ≠ b they are different objectives.
        weight: of the generator's loss: `"uniform"`, 1 in velocity space, or `"sid"`, 1 / mean|x_g − x̂0*| in sample space
            (SiD, Zhou et al. 2024).
        critic_weight: of the critic's loss: `"uniform"`, 1 in velocity space; `"sample"`, 1 in sample space (FastGen); or
            `"edm"`, (σ² + σ_d²) / (σ σ_d)² in sample space (EDM).
        delta_scale: s > 0 in Δ = s (v_ψ − v*). Another s is the same game for another critic: v* + Δ / s where s = 1 has
            v* + Δ. It changes the length of the critic's steps, not the student that the game ends with.
        source: where the preset is from.
    """

    name: str
    critic: Triple
    generator: Triple
    detach: bool = False
    space: str = "velocity"
    weight: str = "uniform"
    critic_weight: str = "uniform"
    delta_scale: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        known = (("space", SPACES), ("weight", GENERATOR_WEIGHTS), ("critic_weight", CRITIC_WEIGHTS))
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Unknown {name} {getattr(self, name)!r} of a loss. Choose one of: {', '.join(choices)}."
                )
        if not all(math.isfinite(value) for value in (*self.critic, *self.generator)):
            raise ValueError(
                f"The coefficients of {self.name!r} must be finite, got {self.critic} and {self.generator}."
            )
        a, b, c = self.critic
        if not (a > 0 and b > 0 and 0 < c <= 1):
            raise ValueError(
                f"The critic's coefficients of {self.name!r} must have a > 0, b > 0 and 0 < c <= 1, got {self.critic}: "
                "‖Δ‖² has the weight c on generated and 1 − c on real data, and where it turns negative the critic's "
                "loss has no minimum."
            )
        if not 0 < self.delta_scale < math.inf:
            raise ValueError(f"The scale of Δ in {self.name!r} must be a positive number, got {self.delta_scale}.")

    @property
    def uses_real_data(self) -> bool:
        """Whether the critic's game has a data term: (1−a, 1−b, 1−c) is not zero."""
        return self.critic != (1.0, 1.0, 1.0)

    @property
    def uses_teacher_in_critic(self) -> bool:
        """Whether ψ depends on the teacher. For c = a (and Δ not scaled) the teacher's terms do not depend on ψ."""
        return self.critic[2] != self.critic[0] or self.delta_scale != 1

    @property
    def finite_at_zero(self) -> bool:
        """Whether both losses are finite at t = 0, where κ is infinite: both are means of squared velocities."""
        return (self.space, self.weight, self.critic_weight) == ("velocity", "uniform", "uniform")

    @property
    def needs_field_gradient(self) -> bool:
        """Whether the generator's gradient flows through the teacher's and critic's networks."""
        return not self.detach

    def critic_loss(
        self,
        critic: torch.Tensor,
        teacher: torch.Tensor | None,
        target: torch.Tensor,
        real: Fields | None = None,
    ) -> torch.Tensor:
        """The critic's loss on a batch, to MINIMISE: −ℓ on generated and, if the preset has it, on real samples.

        Args:
            critic, teacher, target: (B, …) on generated samples. `teacher` may be None when
                `uses_teacher_in_critic` is False; the loss then changes by a constant in ψ (at a = b = c = 1 it is
                the plain matching loss ‖v_ψ − İ‖²).
            real: the same three on real samples, needed when `uses_real_data` is True.

        Returns:
            (B,) losses without a weight; see `loss_weight`.
        """
        loss = -self._gap(critic, teacher, target, self.critic)
        if not self.uses_real_data:
            return loss
        if real is None:
            raise ValueError(f"The objective {self.name!r} uses real data in the critic's loss, but `real` is None.")
        return loss - self._gap(*real, tuple(1 - value for value in self.critic))

    def generator_loss(
        self,
        critic: torch.Tensor,
        teacher: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The generator's loss on a batch, to MINIMISE.

        Args:
            critic, teacher, target: (B, …) at x_t of generated samples; the critic and the teacher are detached here
                when the preset says so.
            weight: (B,) factors from `loss_weight`.
        """
        if self.detach:
            critic, teacher = critic.detach(), teacher.detach()
        loss = self._gap(critic, teacher, target, self.generator)
        return loss if weight is None else weight * loss

    def loss_weight(
        self,
        kappa: torch.Tensor,
        sample: torch.Tensor | None = None,
        teacher_sample: torch.Tensor | None = None,
        weight: str | None = None,
        edm_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Per-sample weight for a loss in this objective's space, (B,), without gradient.

        Args:
            kappa: (B,) κ = α' − β' α / β at the times of the batch; a squared velocity error is κ² times the squared
                error of x̂0.
            sample, teacher_sample: x_g and x̂0* of shape (B, …), needed by the `sid` weight.
            weight: another weight than the generator's: `critic_weight` for the critic.
            edm_weight: (B,) `Interpolant.edm_weight` at the times, needed by the `edm` weight.
        """
        in_sample_space = self.space == "sample"
        with torch.no_grad():
            match weight or self.weight:
                case "uniform":
                    return kappa**2 if in_sample_space else torch.ones_like(kappa)
                case "sample":
                    in_sample = torch.ones_like(kappa)
                case "edm":
                    in_sample = edm_weight
                case _:
                    in_sample = sid_weight(sample, teacher_sample)
            return in_sample if in_sample_space else in_sample / kappa**2

    def check_interpolant(self, interpolant: Interpolant) -> None:
        """Refuses an interpolant on which this objective has no gradient.

        Raises:
            ValueError: when the loss feels the sample only through İ (a_G = c_G = 0 or detached, velocity space) and
                İ does not contain the sample (α' = 0 everywhere, as on variance-exploding paths).
        """
        blind = self.space == "velocity" and (self.detach or (self.generator[0] == 0 and self.generator[2] == 0))
        times = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        if blind and not interpolant.coefficients(times).d_alpha.any():
            raise ValueError(
                f"The objective {self.name!r} in velocity space has no gradient on the interpolant "
                f"{interpolant.name!r}, whose velocity does not contain the sample; use space='sample'."
            )

    def _gap(self, critic: torch.Tensor, teacher: torch.Tensor | None, target: torch.Tensor, triple) -> torch.Tensor:
        if teacher is None:
            if self.uses_teacher_in_critic:
                raise ValueError(f"The objective {self.name!r} needs the teacher in the critic's loss.")
            teacher = target  # any value gives the same gradient in ψ; this one gives the matching loss
        if self.delta_scale != 1:
            critic = teacher + self.delta_scale * (critic - teacher)
        return interpolant_gap(critic, teacher, target, *triple)


#: Presets by name.
PRESETS: dict[str, Callable[..., DistillationObjective]] = {}


def register_preset(build: Callable[..., DistillationObjective]) -> Callable[..., DistillationObjective]:
    """Makes a preset known to `get_objective`, and so to settings, by the function's name; a decorator.

    The function's parameters, all with defaults, are the preset's coefficients.
    """
    PRESETS[build.__name__] = build
    return build


@register_preset
def gap() -> DistillationObjective:
    return DistillationObjective("gap", (1, 1, 1), (1, 1, 1), source="report eq. 4-6; RealUID, UID loss")


@register_preset
def cross_term() -> DistillationObjective:
    return DistillationObjective("cross_term", (1, 1, 1), (0, 1, 0), source="report eq. 7")


@register_preset
def cross_term_detached() -> DistillationObjective:
    return DistillationObjective(
        "cross_term_detached", (1, 1, 1), (0, 1, 0), detach=True, source="the report's code; Diff-Instruct's direction"
    )


@register_preset
def sid(alpha: float = 1.0) -> DistillationObjective:
    source = "SiD (Zhou et al. 2024); alpha = 1.0 or 1.2"
    return DistillationObjective("sid", (1, 1, 1), (1, 1, 2 * alpha), space="sample", weight="sid", source=source)


@register_preset
def realuid(
    alpha: float = 0.92, beta: float = 0.94, gamma: float | None = None, parametrization: str = "standard"
) -> DistillationObjective:
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"Unknown parametrization {parametrization!r} of realuid. Choose one of: {', '.join(PARAMETRIZATIONS)}."
        )
    triple = (alpha, beta, alpha if gamma is None else gamma)
    scale = beta if parametrization == "beta" else 1.0
    source = "RealUID; CIFAR-10 (0.92, 0.94), (0.98, 0.96); its public code has `parametrization`"
    return DistillationObjective("realuid", triple, triple, delta_scale=scale, source=source)


@register_preset
def realsid(alpha: float = 0.94, beta: float = 0.92, alpha_sid: float = 1.0) -> DistillationObjective:
    source = "RealUID, figure 5 (from the paper; not in its code)"
    generator = (alpha, beta, 2 * alpha_sid * alpha)
    return DistillationObjective("realsid", (alpha, beta, alpha), generator, weight="sid", source=source)


@register_preset
def sida(alpha: float = 1.0) -> DistillationObjective:
    return replace(sid(alpha), name="sida", source="SiDA (Zhou et al. 2024): sid with an `encoder` adversarial term")


@register_preset
def dmd2() -> DistillationObjective:
    source = "DMD2 (Yin et al. 2024), its gradient; with a `head` adversarial term"
    return DistillationObjective("dmd2", (1, 1, 1), (0, 1, 0), True, space="sample", weight="sid", source=source)


#: What any preset takes next to its coefficients.
OVERRIDES = ("space", "weight", "critic_weight")


def get_objective(
    name: str,
    *,
    space: str | None = None,
    weight: str | None = None,
    critic_weight: str | None = None,
    **coefficients: float | str,
) -> DistillationObjective:
    """A preset of the family, e.g. `get_objective("sid", alpha=1.2)`, `get_objective("realuid", alpha=0.92, beta=0.94)`.

    Args:
        name: a key of `PRESETS`. (`realuid` has a `parametrization`: "standard", or "beta" for Δ = β (v_ψ − v*).)
        space, weight, critic_weight: instead of the preset's own (see `DistillationObjective`).
        coefficients: the preset's coefficients.

    Raises:
        ValueError: for an unknown name, space or weight, or a coefficient that the preset does not have.
    """
    objective = build_named(PRESETS, "objective", name, coefficients, "coefficient", OVERRIDES)
    changes = dict(zip(OVERRIDES, (space, weight, critic_weight), strict=True))
    return replace(objective, **{key: value for key, value in changes.items() if value is not None})
