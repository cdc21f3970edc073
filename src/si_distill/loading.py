"""Loading of a pipeline that the user named, with an error for people."""

from typing import Any, TypeVar

from .errors import InputError
from .pipelines import InterpolantPipeline, OneStepInterpolantPipeline

Pipeline = TypeVar("Pipeline", InterpolantPipeline, OneStepInterpolantPipeline)


def load_pipeline(cls: type[Pipeline], role: str, name: str, **kwargs: Any) -> Pipeline:
    """The pipeline in a folder or of a Hub id.

    Args:
        cls: the pipeline's class.
        role: what the user calls it, for the error: "teacher" or "student".
        name: the folder or Hub id.
        kwargs: of `from_pretrained`, e.g. `dtype`, `revision`.

    Raises:
        InputError: when it cannot be loaded; the text says why.
    """
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the {role} {name!r}: {error}") from error
