"""Loads a pipeline named by the user, with user-facing errors."""

from pathlib import Path
from typing import Any, TypeVar

from .conversion.diffusers_teachers import convert_diffusers, saved_class
from .errors import InputError
from .pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from .places import check_place, failure

#: Why a folder is not loaded unless its code is trusted.
OWN_CODE = (
    "it brings a network class of its own, code that would be run. Read the Python files next to its weights, and if you "
    "trust them add --trust_remote_code to the command (in Python: trust_remote_code=True)."
)
Pipeline = TypeVar("Pipeline", InterpolantPipeline, OneStepInterpolantPipeline)


def load_pipeline(
    cls: type[Pipeline], role: str, name: str, trust_remote_code: bool = False, **kwargs: Any
) -> Pipeline:
    """The pipeline in a folder or of a Hub id; a teacher may also be diffusers' own (see `convert_diffusers`).

    Args:
        cls: the pipeline's class.
        role: what the user calls it, for the error: "teacher" or "student".
        name: the folder or Hub id.
        trust_remote_code: whether a network class that the folder brings along may run; those of this package, diffusers
            and transformers never need it.
        kwargs: of `from_pretrained`, e.g. `dtype`, `revision`; not for diffusers' own.

    Raises:
        InputError: when it cannot be loaded; the text says why.
    """
    check_place(role, name)
    own: set[str] = {kind.__name__ for kind in (InterpolantPipeline, OneStepInterpolantPipeline)}
    if cls is InterpolantPipeline and not kwargs and saved_class(name) not in {*own, None}:
        return convert_diffusers(name)
    if trust_remote_code:
        kwargs["trust_remote_code"] = True
    try:
        return cls.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = failure(name, error)
        if "trust_remote_code=True" in reason and not trust_remote_code:
            reason = OWN_CODE
        raise InputError(f"Cannot load the {role} {name!r}: {reason}") from error


def check_folder(cls: type[Pipeline], role: str, name: str) -> None:
    """Refuses a folder whose configs `load_pipeline` would refuse; reads no weights."""
    try:
        cls._check_folder(Path(name), {})
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the {role} {name!r}: {error}") from error
