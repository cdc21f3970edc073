"""The losses of the game: the critic's and the student's, of given samples, times and noise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ..adversarial import AdversarialTerm
from ..data.augmentation import Augmentation
from ..interpolants import Interpolant
from ..objectives import DistillationObjective, Fields, sid_weight
from ..velocity import Field

Parts = dict[str, torch.Tensor]


@dataclass
class Images:
    """Generated or real images, and the other end of their path; x0 is None for real images that a recipe does not read.

    Args:
        x0: (B, C, H, W).
        labels: (B,) classes.
        x1: (B, C, H, W) noise, shared by generated and real images, or a bridge's reference.
        reference: (B, C', H, W) what the networks see beside x_t: x1 of a paired bridge, or another condition.
    """

    x0: torch.Tensor | None
    labels: torch.Tensor | None
    x1: torch.Tensor
    reference: torch.Tensor | None = None

    def with_class(self, label: int, where: torch.Tensor) -> "Images":
        return self if self.x0 is None else replace(self, labels=torch.where(where, label, self.labels))

    def augmented(self, augmentation: Augmentation) -> "Images":
        return self if self.x0 is None else replace(self, x0=augmentation(self.x0))


@dataclass
class Draw:
    """What x_t is built with beside the images: fresh, independent of the noise behind the samples; generated and real
    images share it.

    Args:
        t: (B,) times.
        noise: (B, C, H, W) standard normal: x1, or z of a bridge.
        own_t: (B,) times of the adversarial term, if they are its own.
    """

    t: torch.Tensor
    noise: torch.Tensor
    own_t: torch.Tensor | None = None


class DistillationLosses:
    """Both losses of an objective with its adversarial term.

    Args:
        objective: a member of the family.
        adversarial: the term beside it, or None.
        interpolant, prediction_type: the teacher's, which the critic shares.
        teacher: the teacher as a field.
        values: number of values of a sample.
        sees_reference: whether the networks see the reference of a bridge.
        autocast: gives the context in which networks run.
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
    ):
        self.objective, self.adversarial = objective, adversarial
        self.interpolant, self.prediction_type = interpolant, prediction_type
        self.teacher, self.values, self.autocast = teacher, values, autocast
        # A bridge's prediction that lacks x1 is known as it is and in no other space.
        converts = sees_reference or not interpolant.noisy
        self.knows_sample = converts or prediction_type == "sample"
        self.measured_space = "velocity" if converts else prediction_type

    def critic_loss(
        self, critic: Field, fake: Images, real: Images, draw: Draw, told: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Parts]:
        """The critic's loss, shape (), and its parts for the log.

        Args:
            critic: in training.
            fake, real: generated images, detached, and real ones.
            told: (B, L) labels of the augmentation of both.
        """
        objective, space, t, own_t = self.objective, self.objective.space, draw.t, draw.own_t
        # Everything that the critic has to look at goes through it in one forward.
        views = {"fake": (fake, t)}
        if objective.uses_real_data or (self.adversarial is not None and own_t is None):
            views["real"] = (real, t)
        if own_t is not None:
            views |= {"own fake": (fake, own_t), "own real": (real, own_t)}
        z = draw.noise  # not read where γ = 0
        x_t = [self.interpolant.interpolate(images.x0, images.x1, times, z) for images, times in views.values()]
        references = [images.reference for images, _ in views.values()]
        times = [times for _, times in views.values()]
        labels = [images.labels for images, _ in views.values()]
        with self.autocast():
            predictions, logits, log_variance = critic.outputs(
                torch.cat(x_t),
                torch.cat(times),
                torch.cat(labels),
                None if told is None else told.repeat(len(views), 1),
                None if references[0] is None else torch.cat(references),
            )
        seen = dict(
            zip(views, zip(x_t, predictions.chunk(len(views)), _chunks(logits, len(views)), strict=True), strict=True)
        )

        def fields(name: str) -> Fields:
            x_t, prediction, _ = seen[name]
            images, _ = views[name]
            teacher = None
            if objective.uses_teacher_in_critic:
                with torch.no_grad(), self.autocast():
                    teacher = self.teacher(x_t, t, images.labels, space, told, images.reference)
            learned = self.interpolant.convert(prediction, x_t, t, self.prediction_type, space, x1=images.reference)
            return learned, teacher, self.interpolant.target(images.x0, images.x1, t, space, z)

        kappa = self.interpolant.coefficients(t).kappa
        edm_weight = self.interpolant.edm_weight(t) if objective.critic_weight == "edm" else None
        weight = objective.loss_weight(kappa, weight=objective.critic_weight, edm_weight=edm_weight)
        parts = {}
        if log_variance is not None:
            log_variance = log_variance.chunk(len(views))[0]  # of the times `t`, which "fake" has
            weight = weight * torch.exp(-log_variance)
            parts["critic_log_variance"] = log_variance.mean()
        real = fields("real") if objective.uses_real_data else None
        loss = (weight * objective.critic_loss(*fields("fake"), real=real)).mean()
        loss = loss if log_variance is None else loss + log_variance.mean()
        parts["critic_loss"] = loss
        if self.adversarial is not None:
            prefix = "" if own_t is None else "own "
            in_sample_space = weight if space == "sample" else weight * kappa**2  # where SiDA weighs its term
            adversarial = self.adversarial.critic_loss(
                seen[prefix + "real"][2],
                seen[prefix + "fake"][2],
                in_sample_space if self.adversarial.kind == "encoder" else torch.ones_like(t),
                self.values,
            )
            parts["critic_adversarial_loss"] = adversarial
            loss = loss + adversarial
        return loss, parts

    def generator_loss(self, critic: Field, fake: Images, draw: Draw, judged: bool) -> tuple[torch.Tensor, Parts]:
        """The student's loss, shape (), and its parts for the log.

        Args:
            critic: frozen, its gradient flowing through it.
            fake: generated images, with their graph.
            judged: whether the student feels the adversarial term.
        """
        objective, space = self.objective, self.objective.space
        t, z, own_t = draw.t, draw.noise, draw.own_t
        samples, labels, x1, reference = fake.x0, fake.labels, fake.x1, fake.reference
        x_t = self.interpolant.interpolate(samples, x1, t, z)
        with self.autocast():
            with torch.set_grad_enabled(objective.needs_field_gradient):
                teacher = self.teacher.predict(x_t, t, labels, reference)
            with torch.set_grad_enabled(objective.needs_field_gradient or judged):
                if judged and own_t is not None:
                    own_x_t = self.interpolant.interpolate(samples, x1, own_t, z)
                    prediction, logits, log_variance = critic.outputs(
                        torch.cat([x_t, own_x_t]),
                        torch.cat([t, own_t]),
                        labels.repeat(2),
                        reference=None if reference is None else torch.cat([reference, reference]),
                    )
                    learned, logits = prediction.chunk(2)[0], logits.chunk(2)[1]
                else:
                    learned, logits, log_variance = critic.outputs(x_t, t, labels, reference=reference)

        def in_space(prediction: torch.Tensor, target: str) -> torch.Tensor:
            return self.interpolant.convert(prediction, x_t, t, self.prediction_type, target, x1=reference)

        kappa = self.interpolant.coefficients(t).kappa
        with torch.no_grad():
            x0_teacher = in_space(teacher, "sample") if self.knows_sample else None
            # SiDA on EDM2 divides all of the generator's terms by e^u.
            certainty = torch.ones_like(t) if log_variance is None else torch.exp(-log_variance[: len(t)])
            weight = certainty * objective.loss_weight(kappa, samples, x0_teacher)
            of_teacher, of_critic = (in_space(field, self.measured_space) for field in (teacher, learned))
            truth = self.interpolant.target(samples, x1, t, self.measured_space, z)
            parts = {
                "field_distance": (of_critic - of_teacher).square().mean(),
                "critic_matching_loss": (of_critic - truth).square().mean(),
                "teacher_matching_loss": (of_teacher - truth).square().mean(),
                "sample_mean": samples.mean(),
                "sample_std": samples.std(),
            }
        target = self.interpolant.target(samples, x1, t, space, z)
        loss = objective.generator_loss(in_space(learned, space), in_space(teacher, space), target, weight).mean()
        parts["generator_loss"] = loss
        if judged:
            encoder = self.adversarial.kind == "encoder"
            adversarial = self.adversarial.generator_loss(
                logits, certainty * sid_weight(samples, x0_teacher) if encoder else torch.ones_like(t), self.values
            )
            parts["generator_adversarial_loss"] = adversarial
            loss = loss + adversarial
        return loss, parts


def _chunks(logits: torch.Tensor | None, count: int) -> tuple[torch.Tensor | None, ...]:
    return (None,) * count if logits is None else logits.chunk(count)
