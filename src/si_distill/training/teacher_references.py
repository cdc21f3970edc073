"""Reference images in the training of a teacher: what does not go together."""

from ..data.config import DataConfig
from ..errors import InputError
from ..interpolants import Interpolant


def check_teacher_references(data: DataConfig, interpolant: Interpolant, prediction_type: str) -> None:
    """Refuses data without the references that a path starts from, and references that a path or a network cannot use.

    Raises:
        InputError: says which, and what to set.
    """
    bridge = not interpolant.gaussian_reference
    try:
        interpolant.check_predictions(prediction_type)
    except ValueError as error:
        raise InputError(str(error)) from None
    if bridge and not data.has_references:
        raise InputError(
            f"The interpolant {interpolant.name!r} starts from reference images: set `data.degradation` or "
            "`data.reference_column` (pairs), or `data.reference_name` (unpaired)."
        )
    if not bridge and data.reference_name:
        raise InputError(
            f"`data.reference_name` gives unpaired references, but the interpolant {interpolant.name!r} starts from noise, "
            "and they say nothing about an image: take `bridge`, or pairs."
        )
    if interpolant.noisy and data.is_paired and prediction_type != "sample":
        raise InputError(
            f"A network that sees the pair's reference on the interpolant {interpolant.name!r} predicts the sample, but "
            f"prediction_type is {prediction_type!r}: set it to sample."
        )
