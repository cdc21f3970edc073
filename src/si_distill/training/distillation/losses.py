"""The two losses of the game, of given samples, times and noise.

`si_distill.objectives` has the family ℓ(x; a, b, c) itself. At a point x_t = α x0 + β x1 + γ z of a sample's path
the critic v_ψ, the frozen teacher v* and the conditional velocity İ meet:

    critic     min over ψ:  E w_ψ(t) · [−ℓ_gen − ℓ_data] · e^−u + u  +  λ_D · adversarial
    generator  min over θ:  E w_θ(t) ·  ℓ_gen            · e^−u      +  λ_G · adversarial

(report, eq. 4 to 7; u: EDM2, eq. 21; the adversarial terms: SiDA, DMD2, RealUID).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace

import torch

from ...adversarial import AdversarialTerm
from ...data.augmentation import Augmentation
from ...objectives import DistillationObjective, sid_weight
from ...pipelines import Condition, Field


@dataclass
class Images:
    """Generated or real images, and what networks are told of them.

    Args:
        x0: (B, C, H, W); None for real images that a recipe does not read.
        condition: what networks are told.
        x1: (B, C, H, W) the other end of a bridge's path; None where it is the noise of the draw.
    """

    x0: torch.Tensor | None
    condition: Condition
    x1: torch.Tensor | None = None

    def nulled(self, null: Condition, where: torch.Tensor) -> "Images":
        return self if self.x0 is None else replace(self, condition=self.condition.nulled(null, where))

    def augmented(self, augmentation: Augmentation) -> "Images":
        if self.x0 is None:
            return self
        told = replace(self.condition, augment=augmentation.labels)
        return replace(self, x0=augmentation(self.x0), condition=told)


@dataclass
class Draw:
    """Times and noise that x_t is built with: fresh, independent of the noise behind the samples.

    Args:
        t: (B,) times.
        noise: (B, C, H, W) standard normal: x1, or z of a bridge.
        adversarial: those of the adversarial term, if it has its own.
        adversarial_real: those of its real images, if they are not the ones of its generated images.
    """

    t: torch.Tensor
    noise: torch.Tensor
    adversarial: "Draw | None" = None
    adversarial_real: "Draw | None" = None


@dataclass(eq=False)
class Point:
    """Images on their paths, and what the critic says there.

    Args:
        images: x0 and what networks are told.
        t, noise: of the draw.
        x1, x_t: (B, C, H, W) the other end, and the state at t.
        prediction, logits, log_variance: (B, C, H, W), (B, M) and u (B,), of the critic.
    """

    images: Images
    t: torch.Tensor
    noise: torch.Tensor
    x1: torch.Tensor
    x_t: torch.Tensor
    prediction: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None

    @property
    def certainty(self) -> torch.Tensor:
        """e^−u, (B,), without gradient; ones for a critic without a log-variance."""
        return torch.ones_like(self.t) if self.log_variance is None else torch.exp(-self.log_variance.detach())


@dataclass
class Terms:
    """A loss and its terms, all of shape (); the objective's are means over values, whatever the total is."""

    total: torch.Tensor

    def logged(self) -> dict[str, torch.Tensor]:
        """The terms that there are, by their names in the log."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "total"}
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class CriticTerms(Terms):
    """Of the critic's loss; `critic_log_variance` is the mean of u."""

    critic_loss: torch.Tensor
    critic_adversarial_loss: torch.Tensor | None = None
    critic_log_variance: torch.Tensor | None = None


@dataclass
class GeneratorTerms(Terms):
    """Of the student's loss, unscaled.

    Args:
        field_distance: mean ‖v_ψ − v*‖², of what the networks predict.
        critic_matching_loss, teacher_matching_loss: mean ‖v_ψ − İ‖² and ‖v* − İ‖².
        sample_mean, sample_std: of the generated values.
    """

    generator_loss: torch.Tensor
    field_distance: torch.Tensor
    critic_matching_loss: torch.Tensor
    teacher_matching_loss: torch.Tensor
    sample_mean: torch.Tensor
    sample_std: torch.Tensor
    generator_adversarial_loss: torch.Tensor | None = None


class DistillationLosses:
    """Both losses of an objective with its adversarial term.

    Args:
        objective: a member of the family.
        adversarial: the term next to it, or None.
        teacher: the teacher as a field, on whose path the critic is too; with `teacher_features` its second output are
            features.
        values: N, number of values of a sample.
        autocast: gives the context in which networks run.
        sees_reference: whether the networks see the reference of a bridge.
        teacher_features: whether the adversarial head reads the teacher's features instead of the critic's.
        critic_sum, generator_sum: whether each loss is a sum over the N values of a sample instead of a mean.
        scale: factor of the generator's objective.
    """

    def __init__(
        self,
        objective: DistillationObjective,
        adversarial: AdversarialTerm | None,
        teacher: Field,
        values: int,
        autocast: Callable[[], AbstractContextManager],
        sees_reference: bool = False,
        teacher_features: bool = False,
        critic_sum: bool = False,
        generator_sum: bool = False,
        scale: float = 1.0,
    ):
        self.objective, self.adversarial, self.teacher = objective, adversarial, teacher
        self.interpolant, self.autocast = teacher.interpolant, autocast
        self.teacher_features, self.scale = teacher_features, scale
        self.critic_values, self.generator_values = (values if summed else 1 for summed in (critic_sum, generator_sum))
        # A bridge's prediction that lacks x1 is known as it is and in no other space.
        converts = sees_reference or not self.interpolant.noisy
        self.knows_sample = converts or teacher.prediction_type == "sample"
        self.measured_space = "velocity" if converts else teacher.prediction_type

    # The critic's loss.

    def critic_loss(self, critic: Field, fake: Images, real: Images, draw: Draw) -> CriticTerms:
        """The critic's loss.

        Args:
            critic: the field of the critic, in training.
            fake, real: generated images, detached, and real ones.
            draw: times and noise.
        """
        fakes = self._at(fake, draw)
        reals = self._at(real, draw) if self.objective.uses_real_data else None
        judged = () if self.adversarial is None else self._judged(fakes, fake, reals, real, draw)
        self._look(critic, fakes, reals, *(() if self.teacher_features else judged))
        if judged and self.teacher_features:
            with torch.no_grad(), self.autocast():
                features = [self._teacher(point)[1] for point in judged]
            self._judge(critic, judged, features)

        kappa = self.interpolant.coefficients(draw.t).kappa
        edm_weight = self.interpolant.edm_weight(draw.t) if self.objective.critic_weight == "edm" else None
        weight = self.objective.loss_weight(kappa, weight=self.objective.critic_weight, edm_weight=edm_weight)
        if fakes.log_variance is not None:
            weight = weight * torch.exp(-fakes.log_variance)  # here u learns
        on_real = None if reals is None else self._fields(reals)
        loss = (weight * self.objective.critic_loss(*self._fields(fakes), real=on_real)).mean()
        u = None if fakes.log_variance is None else fakes.log_variance.mean()
        loss = loss if u is None else loss + u
        terms = CriticTerms(self.critic_values * loss, critic_loss=loss, critic_log_variance=u)
        if judged:
            in_sample_space = weight if self.objective.space == "sample" else weight * kappa**2  # where SiDA weighs it
            by = in_sample_space if self.adversarial.kind == "encoder" else torch.ones_like(draw.t)
            terms.critic_adversarial_loss = self.adversarial.critic_loss(judged[1].logits, judged[0].logits, by)
            terms.total = terms.total + terms.critic_adversarial_loss
        return terms

    def _fields(self, point: Point) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """v_ψ, v* (or None) and İ at a point, in the objective's space."""
        space, teacher = self.objective.space, None
        if self.objective.uses_teacher_in_critic:
            with torch.no_grad(), self.autocast():
                teacher = self._teacher(point)[0]
            teacher = self._in_space(point, teacher, space)
        return self._in_space(point, point.prediction, space), teacher, self._target(point, space)

    def _judged(self, fakes: Point, fake: Images, reals: Point | None, real: Images, draw: Draw) -> tuple[Point, Point]:
        """Generated and real images where the adversarial term looks at them; points that are there already are reused."""
        own = draw.adversarial
        judged = fakes if own is None else self._at(fake, own)
        if draw.adversarial_real is not None:
            return judged, self._at(real, draw.adversarial_real)
        if own is None and reals is not None:
            return judged, reals
        return judged, self._at(real, own or draw)

    # The student's loss.

    def generator_loss(self, critic: Field, fake: Images, draw: Draw, judged: bool) -> GeneratorTerms:
        """The student's loss.

        Args:
            critic: the field of the critic, frozen, its gradient flowing through it.
            fake: generated images, with their graph.
            draw: times and noise.
            judged: whether to add the adversarial loss.
        """
        fakes = self._at(fake, draw)
        judged_at = fakes if draw.adversarial is None else self._at(fake, draw.adversarial)
        v_teacher = self._seen_by_both(critic, fakes, judged_at if judged else None)

        kappa = self.interpolant.coefficients(draw.t).kappa
        with torch.no_grad():
            x0_teacher = self._in_space(fakes, v_teacher, "sample") if self.knows_sample else None
            # SiD and SiDA on EDM2 divide all of the generator's terms by e^u.
            weight = fakes.certainty * self.objective.loss_weight(kappa, fake.x0, x0_teacher)
        space = self.objective.space
        learned, taught = (self._in_space(fakes, field, space) for field in (fakes.prediction, v_teacher))
        loss = self.objective.generator_loss(learned, taught, self._target(fakes, space), weight).mean()
        terms = GeneratorTerms(
            self.generator_values * self.scale * loss, generator_loss=loss, **self._measured(fakes, v_teacher)
        )
        if judged:
            encoder = self.adversarial.kind == "encoder"
            by = fakes.certainty * sid_weight(fake.x0, x0_teacher) if encoder else torch.ones_like(draw.t)
            adversarial = self.adversarial.generator_loss(judged_at.logits, by, self.generator_values)
            terms.generator_adversarial_loss = adversarial
            terms.total = self.adversarial.combined(terms.total, adversarial)
        return terms

    def _seen_by_both(self, critic: Field, fakes: Point, judged_at: Point | None) -> torch.Tensor:
        """The teacher's prediction at `fakes`; the critic's there, and the logits where the adversarial term looks, if it
        does, are filled in. Each network keeps the graph of what the student's gradient flows through.
        """
        judged, by_teacher = judged_at is not None, judged_at is not None and self.teacher_features
        needs = self.objective.needs_field_gradient
        with self.autocast():
            with torch.set_grad_enabled(needs or (by_teacher and judged_at is fakes)):
                v_teacher, *features = self._teacher(fakes)
            if by_teacher:
                if judged_at is not fakes:
                    features = [self._teacher(judged_at)[1]]
                self._judge(critic, (judged_at,), features)
        by_critic = judged and not by_teacher
        with torch.set_grad_enabled(needs or by_critic):
            self._look(critic, fakes, judged_at if by_critic else None)
        return v_teacher

    @torch.no_grad()
    def _measured(self, fakes: Point, v_teacher: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms of a `GeneratorTerms` that are only watched."""
        of_teacher, of_critic = (
            self._in_space(fakes, field, self.measured_space) for field in (v_teacher, fakes.prediction)
        )
        truth, samples = self._target(fakes, self.measured_space), fakes.images.x0
        return dict(
            field_distance=(of_critic - of_teacher).square().mean(),
            critic_matching_loss=(of_critic - truth).square().mean(),
            teacher_matching_loss=(of_teacher - truth).square().mean(),
            sample_mean=samples.mean(),
            sample_std=samples.std(),
        )

    # What both need.

    def _at(self, images: Images, draw: Draw) -> Point:
        x1 = draw.noise if images.x1 is None else images.x1
        x_t = self.interpolant.interpolate(images.x0, x1, draw.t, draw.noise)  # the noise is not read where γ = 0
        return Point(images, draw.t, draw.noise, x1, x_t)

    def _look(self, critic: Field, *at: Point | None) -> None:
        """Fills in what the critic says at the distinct points, all in one forward."""
        points = list(dict.fromkeys(point for point in at if point is not None))
        with self.autocast():
            outputs = critic.outputs(
                torch.cat([point.x_t for point in points]),
                torch.cat([point.t for point in points]),
                Condition.cat(*(point.images.condition for point in points)),
            )
        for output, name in zip(outputs, ("prediction", "logits", "log_variance"), strict=True):
            if output is not None:
                for point, share in zip(points, output.chunk(len(points)), strict=True):
                    setattr(point, name, share)

    def _judge(self, critic: Field, points: tuple[Point, ...], features: list[torch.Tensor]) -> None:
        """Fills in the logits of the teacher's features at the points."""
        with self.autocast():
            logits = critic.network(features=torch.cat(features))
        for point, share in zip(points, logits.chunk(len(points)), strict=True):
            point.logits = share

    def _teacher(self, point: Point) -> tuple[torch.Tensor, ...]:
        """The teacher's prediction at a point, and its features where it gives them."""
        return self.teacher.outputs(point.x_t, point.t, point.images.condition)

    def _in_space(self, point: Point, prediction: torch.Tensor, space: str) -> torch.Tensor:
        return self.teacher.convert(prediction, point.x_t, point.t, point.images.condition, space)

    def _target(self, point: Point, space: str) -> torch.Tensor:
        return self.interpolant.target(point.images.x0, point.x1, point.t, space, point.noise)
