"""Reference images in a distillation: what the path starts from, what networks see, and what does not go together."""

from dataclasses import dataclass, replace

import torch

from ...data.batches import Batch
from ...data.references import optimal_assignment
from ...errors import InputError
from ...pipelines import InterpolantPipeline
from .config import DistillConfig


@dataclass(frozen=True)
class References:
    """How a game uses reference images; neither of both is the game of noise alone.

    Args:
        bridge: whether they are x1, where the path and the student start.
        seen: whether the networks see them next to x_t: pairs on a bridge, or the condition of a teacher on noise.
        paired: whether each image has its own.
        transported: whether unpaired ones are assigned to the images by minibatch optimal transport.
    """

    bridge: bool = False
    seen: bool = False
    paired: bool = True
    transported: bool = False

    @property
    def needed(self) -> bool:
        """Whether the game cannot be played without data that has references."""
        return self.bridge or self.seen

    def start(self, batch: Batch) -> torch.Tensor | None:
        """(B, …) the references that the student starts from or sees."""
        if not self.needed:
            return None
        return batch["reference"] if self.paired else batch["other_reference"]

    def x1(self, samples: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """(B, …) the other end of the path of each generated sample; None where it is noise.

        A pair keeps its own. Without pairs it is a reference that the sample was not made from, coupled as the teacher's
        were: the critic learns the teacher's kind of field.
        """
        if not self.bridge:
            return None
        if not self.transported:
            return batch["reference"]
        return batch["reference"][optimal_assignment(samples.detach(), batch["reference"])]


def reference_roles(settings: DistillConfig, teacher: InterpolantPipeline) -> References:
    """What references are to this teacher.

    Raises:
        InputError: when the data do not give what the teacher needs, or the settings ask for what a bridge cannot do.
    """
    scheduler, data = teacher.scheduler, settings.data
    roles = References(
        bridge=not scheduler.interpolant.gaussian_reference,
        seen=teacher.network.condition_channels > 0,
        paired=data.is_paired,
        transported=data.coupling == "optimal_transport",
    )
    if not roles.needed:
        if data.has_references:
            raise InputError(
                f"`data` gives reference images, but the teacher {settings.teacher!r} neither starts from them nor sees "
                "them: leave `data.degradation`, `data.reference_column` and `data.reference_name` out."
            )
        return replace(roles, paired=True, transported=False)
    if not data.has_references:
        raise InputError(
            f"The teacher {settings.teacher!r} {'starts from' if roles.bridge else 'sees'} reference images, and "
            "distillation needs them whatever the objective: set `data.degradation` or `data.reference_column` (pairs), or "
            "`data.reference_name` (unpaired)."
        )
    if roles.seen and not roles.paired:
        raise InputError(
            f"The teacher {settings.teacher!r} sees each image's own reference, but the data are unpaired: give pairs with "
            "`data.degradation` or `data.reference_column`."
        )
    if roles.bridge and roles.seen and scheduler.interpolant.noisy and scheduler.config.prediction_type != "sample":
        raise InputError(
            f"The teacher {settings.teacher!r} of a paired bridge predicts {scheduler.config.prediction_type}, which says "
            "nothing at t = 1, where the student starts: train it with prediction_type=sample."
        )
    if roles.paired and settings.label_sampling is not None:
        raise InputError(
            f"`label_sampling` is {settings.label_sampling!r}, but a pair's class is that of its image: leave it out."
        )
    return roles


def noise_channels(settings: DistillConfig, teacher: InterpolantPipeline) -> int:
    """Channels of the noise that the student sees: as asked, or on a bridge whose network sees x1 those of an image.

    Raises:
        InputError: when noise channels are asked for where the student's input is noise anyway.
    """
    asked = settings.noise_channels
    if not teacher.scheduler.interpolant.gaussian_reference:
        default = teacher.network.sample_shape[0] if teacher.network.condition_channels else 0
        return default if asked is None else asked
    if asked:
        raise InputError(
            f"`noise_channels` is {asked}, but the student of a teacher on noise starts from noise: leave it out."
        )
    return 0
