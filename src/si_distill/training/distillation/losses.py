"""The losses of the game: the critic's and the student's, of given samples, times and noise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ...adversarial import AdversarialTerm
from ...data.augmentation import Augmentation
from ...field import Field
from ...interpolants import Interpolant
from ...objectives import DistillationObjective, Fields, sid_weight

Parts = dict[str, torch.Tensor]


@dataclass
class Images:
    """Generated or real images, and what networks are told of them; x0 is None for real images that a recipe does not read.

    Args:
        x0: (B, C, H, W).
        labels: (B,) classes.
        x1: (B, C, H, W) the other end of a bridge's path; None where it is the noise of the draw.
        reference: (B, C', H, W) what the networks see next to x_t: x1 of a paired bridge, or another condition.
        augment_labels: (B, L) what augmentation did to x0; None is nothing.
    """

    x0: torch.Tensor | None
    labels: torch.Tensor | None
    x1: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    augment_labels: torch.Tensor | None = None

    def with_class(self, label: int, where: torch.Tensor) -> "Images":
        return self if self.x0 is None else replace(self, labels=torch.where(where, label, self.labels))

    def augmented(self, augmentation: Augmentation) -> "Images":
        if self.x0 is None:
            return self
        return replace(self, x0=augmentation(self.x0), augment_labels=augmentation.labels)


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
        prediction, logits, log_variance: of the critic.
    """

    images: Images
    t: torch.Tensor
    noise: torch.Tensor
    x1: torch.Tensor
    x_t: torch.Tensor
    prediction: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None


class DistillationLosses:
    """Both losses of an objective with its adversarial term.

    Args:
        objective: a member of the family.
        adversarial: the term next to it, or None.
        interpolant, prediction_type: the teacher's, which the critic shares.
        teacher: the teacher as a field; with `teacher_features` its second output are features.
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
        interpolant: Interpolant,
        prediction_type: str,
        teacher: Field,
        values: int,
        autocast: Callable[[], AbstractContextManager],
        sees_reference: bool = False,
        teacher_features: bool = False,
        critic_sum: bool = False,
        generator_sum: bool = False,
        scale: float = 1.0,
    ):
        self.objective, self.adversarial = objective, adversarial
        self.interpolant, self.prediction_type = interpolant, prediction_type
        self.teacher, self.autocast = teacher, autocast
        self.teacher_features, self.scale = teacher_features, scale
        self.critic_values, self.generator_values = (values if summed else 1 for summed in (critic_sum, generator_sum))
        # A bridge's prediction that lacks x1 is known as it is and in no other space.
        converts = sees_reference or not interpolant.noisy
        self.knows_sample = converts or prediction_type == "sample"
        self.measured_space = "velocity" if converts else prediction_type

    def critic_loss(self, critic: Field, fake: Images, real: Images, draw: Draw) -> tuple[torch.Tensor, Parts]:
        """The critic's loss, shape (), and its parts for the log (the objective's as a mean over values).

        Args:
            critic: in training.
            fake, real: generated images, detached, and real ones.
            draw: times and noise.
        """
        objective, t = self.objective, draw.t
        fakes = self._at(fake, draw)
        reals = self._at(real, draw) if objective.uses_real_data else None
        judged = () if self.adversarial is None else self._judged(fakes, fake, reals, real, draw)
        # Everything that the critic has to look at goes through it in one forward.
        own = () if self.teacher_features else judged
        self._look(critic, _distinct(fakes, reals, *own))
        if judged and self.teacher_features:
            with torch.no_grad(), self.autocast():
                features = [self._teacher(point)[1] for point in judged]
            self._judge(critic, judged, features)

        kappa = self.interpolant.coefficients(t).kappa
        edm_weight = self.interpolant.edm_weight(t) if objective.critic_weight == "edm" else None
        weight = objective.loss_weight(kappa, weight=objective.critic_weight, edm_weight=edm_weight)
        parts = {}
        if fakes.log_variance is not None:
            weight = weight * torch.exp(-fakes.log_variance)
            parts["critic_log_variance"] = fakes.log_variance.mean()
        loss = objective.critic_loss(*self._fields(fakes), real=None if reals is None else self._fields(reals))
        loss = (weight * loss).mean()
        loss = loss if fakes.log_variance is None else loss + fakes.log_variance.mean()
        parts["critic_loss"] = loss
        total = self.critic_values * loss
        if judged:
            in_sample_space = weight if objective.space == "sample" else weight * kappa**2  # where SiDA weighs its term
            adversarial = self.adversarial.critic_loss(
                judged[1].logits,
                judged[0].logits,
                in_sample_space if self.adversarial.kind == "encoder" else torch.ones_like(t),
            )
            parts["critic_adversarial_loss"] = adversarial
            total = total + adversarial
        return total, parts

    def generator_loss(self, critic: Field, fake: Images, draw: Draw, judged: bool) -> tuple[torch.Tensor, Parts]:
        """The student's loss, shape (), and its parts for the log (the objective's as a mean over values, unscaled).

        Args:
            critic: frozen, its gradient flowing through it.
            fake: generated images, with their graph.
            draw: times and noise.
            judged: whether to add the adversarial loss.
        """
        objective, samples, t = self.objective, fake.x0, draw.t
        fakes = self._at(fake, draw)
        judged_at = fakes if draw.adversarial is None else self._at(fake, draw.adversarial)
        # Whose gradient is needed: the objective's own, and that of the features that logits come from.
        needs = objective.needs_field_gradient
        with self.autocast():
            with torch.set_grad_enabled(needs or (judged and self.teacher_features and judged_at is fakes)):
                teacher, *features = self._teacher(fakes)
            if judged and self.teacher_features:
                if judged_at is not fakes:
                    features = [self._teacher(judged_at)[1]]
                self._judge(critic, (judged_at,), features)
        with torch.set_grad_enabled(needs or (judged and not self.teacher_features)):
            self._look(critic, _distinct(fakes, judged_at if judged and not self.teacher_features else None))

        def in_space(prediction: torch.Tensor, space: str) -> torch.Tensor:
            return self._in_space(fakes, prediction, space)

        kappa = self.interpolant.coefficients(t).kappa
        with torch.no_grad():
            x0_teacher = in_space(teacher, "sample") if self.knows_sample else None
            # SiD and SiDA on EDM2 divide all of the generator's terms by e^u.
            certainty = torch.ones_like(t) if fakes.log_variance is None else torch.exp(-fakes.log_variance)
            weight = certainty * objective.loss_weight(kappa, samples, x0_teacher)
            of_teacher, of_critic = (in_space(field, self.measured_space) for field in (teacher, fakes.prediction))
            truth = self._target(fakes, self.measured_space)
            parts = {
                "field_distance": (of_critic - of_teacher).square().mean(),
                "critic_matching_loss": (of_critic - truth).square().mean(),
                "teacher_matching_loss": (of_teacher - truth).square().mean(),
                "sample_mean": samples.mean(),
                "sample_std": samples.std(),
            }
        learned, teacher = (in_space(field, objective.space) for field in (fakes.prediction, teacher))
        loss = objective.generator_loss(learned, teacher, self._target(fakes, objective.space), weight).mean()
        parts["generator_loss"] = loss
        total = self.generator_values * self.scale * loss
        if judged:
            encoder = self.adversarial.kind == "encoder"
            adversarial = self.adversarial.generator_loss(
                judged_at.logits,
                certainty * sid_weight(samples, x0_teacher) if encoder else torch.ones_like(t),
                self.generator_values,
            )
            parts["generator_adversarial_loss"] = adversarial
            total = self.adversarial.combined(total, adversarial)
        return total, parts

    def _at(self, images: Images, draw: Draw) -> Point:
        x1 = draw.noise if images.x1 is None else images.x1
        x_t = self.interpolant.interpolate(images.x0, x1, draw.t, draw.noise)  # the noise is not read where γ = 0
        return Point(images, draw.t, draw.noise, x1, x_t)

    def _judged(self, fakes: Point, fake: Images, reals: Point | None, real: Images, draw: Draw) -> tuple[Point, Point]:
        """Generated and real images where the adversarial term looks at them; points that are there already are reused."""
        own = draw.adversarial
        judged = fakes if own is None else self._at(fake, own)
        if draw.adversarial_real is not None:
            return judged, self._at(real, draw.adversarial_real)
        if own is None and reals is not None:
            return judged, reals
        return judged, self._at(real, own or draw)

    def _look(self, critic: Field, points: list[Point]) -> None:
        """Fills in what the critic says at the points, in one forward."""
        with self.autocast():
            outputs = critic.outputs(
                torch.cat([point.x_t for point in points]),
                torch.cat([point.t for point in points]),
                torch.cat([point.images.labels for point in points]),
                _cat([point.images.augment_labels for point in points]),
                _cat([point.images.reference for point in points]),
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
        images = point.images
        return self.teacher.outputs(point.x_t, point.t, images.labels, images.augment_labels, images.reference)

    def _fields(self, point: Point) -> Fields:
        """v_ψ, v* (or None) and İ at a point, in the objective's space."""
        space, teacher = self.objective.space, None
        if self.objective.uses_teacher_in_critic:
            with torch.no_grad(), self.autocast():
                teacher = self._teacher(point)[0]
            teacher = self._in_space(point, teacher, space)
        return self._in_space(point, point.prediction, space), teacher, self._target(point, space)

    def _in_space(self, point: Point, prediction: torch.Tensor, space: str) -> torch.Tensor:
        return self.interpolant.convert(
            prediction, point.x_t, point.t, self.prediction_type, space, x1=point.images.reference
        )

    def _target(self, point: Point, space: str) -> torch.Tensor:
        return self.interpolant.target(point.images.x0, point.x1, point.t, space, point.noise)


def _distinct(*points: Point | None) -> list[Point]:
    return list(dict.fromkeys(point for point in points if point is not None))


def _cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)
