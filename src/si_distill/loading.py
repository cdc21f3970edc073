"""Loading of a pipeline that the user named, with an error for people."""

from typing import TypeVar

from .errors import InputError
from .pipelines import InterpolantPipeline, OneStepInterpolantPipeline

Pipeline = TypeVar("Pipeline", InterpolantPipeline, OneStepInterpolantPipeline)


def load_pipeline(cls: type[Pipeline], role: str, name: str) -> Pipeline:
    """The pipeline in a folder or of a Hub id.

    Args:
        cls: the pipeline's class.
        role: what the user calls it, for the error: "teacher" or "student".
        name: the folder or Hub id.

    Raises:
        InputError: when it cannot be loaded; the text says why.
    """
    try:
        return cls.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the {role} {name!r}: {error}") from error
