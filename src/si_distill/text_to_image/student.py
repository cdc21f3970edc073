"""A text-to-image student in a folder that stock diffusers can use: its weights, its scheduler, and how to call it.

| file | what it holds |
|---|---|
| `student.json` | the base, the size, and the arguments of a stock call for each number of steps |
| `scheduler/` | the stock scheduler whose steps are the student's |
| `pytorch_lora_weights.safetensors` | the adapter, where it is one; otherwise the folder is a whole stock pipeline |
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import safe_open

from ..errors import InputError
from ..files import write_text
from ..fingerprints import hub_commit
from ..reading import read_json
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .conventions import CONVENTIONS
from .lora import LORA_WEIGHTS, LoraWeights
from .network import TextNetwork
from .stock_calls import stock_scheduler, student_times
from .teacher import STUDENT, TextToImageTeacher, load_stock_pipeline

#: The student's name among the adapters of a loaded pipeline.
ADAPTER = "student"

_ARGUMENTS = {
    "num_inference_steps": int,
    "sigmas?": [float],
    "timesteps?": [int],
    "guidance_scale?": float,
    "true_cfg_scale?": float,
    "use_resolution_binning?": bool,
    "max_sequence_length?": int,
}
_SHAPE = {
    "base": str,
    "revision": (str, None),
    "pipeline_class": str,
    "lora_rank": (int, None),
    "height": int,
    "width": int,
    "student_steps": [int],
    "arguments": {str: _ARGUMENTS},
    "max_sequence_length": (int, None),
}


class TextToImageStudent:
    """
    What a run or a library user saves: `save_pretrained` writes the folder that `load_student` and stock diffusers read.

    An adapter is saved in float32, as it was trained: loaders cast it to the base's precision.

    Args:
        teacher: whose pipeline the student is a part of; it is not changed.
        network: the trained network: an adapter on the teacher's, or one of its own.
        scheduler: the student's: its steps, times and solver.
        base: the folder or repository of the teacher's pipeline.
        settings: with `max_length` and `told_guidance`, as the texts were encoded.

    Raises:
        InputError: when no call of the stock pipeline takes the student's steps.
    """

    def __init__(
        self,
        teacher: TextToImageTeacher,
        network: TextNetwork,
        scheduler: StochasticInterpolantScheduler,
        base: str,
        settings: Any,
    ):
        self.teacher, self.network, self.base = teacher, network, base
        self.steps = list(scheduler.config.student_steps or [1])
        self.scheduler = stock_scheduler(scheduler)
        convention = teacher.convention
        told = dict(convention.unguided)
        if convention.told_guidance and settings.told_guidance is not None:
            told["guidance_scale"] = settings.told_guidance
        # CLIP's length is fixed.
        self.max_length = settings.max_length if convention.network == "transformer" else None
        if self.max_length is not None:
            told["max_sequence_length"] = self.max_length
        self.arguments = {
            count: {**student_times(scheduler, self.scheduler, count, convention.equal_steps), **told}
            for count in self.steps
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder; `student.json` comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.network.shares_base:
            LoraWeights(self.teacher, self.network).save_pretrained(folder)
            self.scheduler.save_pretrained(folder / "scheduler")
        else:
            self.teacher.pipeline_with(self.network, scheduler=self.scheduler).save_pretrained(folder)
        write_text(folder / STUDENT, json.dumps(self.record, indent=1) + "\n")

    @contextlib.contextmanager
    def loaded(self) -> Iterator["LoadedStudent"]:
        """What `load_student` would make of the folder, around the weights in memory; the teacher's network has the adapter
        inside meanwhile.
        """
        pipeline = self.teacher.pipeline_with(self.network, scheduler=self.scheduler)
        with self.network.worn():
            yield LoadedStudent(pipeline, self.record)

    @property
    def record(self) -> dict[str, Any]:
        """The contents of `student.json`."""
        height, width = self.teacher.size
        return {
            "base": self.base,
            "revision": None if Path(self.base).exists() else hub_commit(self.teacher.transformer.config),
            "pipeline_class": type(self.teacher.pipeline).__name__,
            "lora_rank": self.network.adapters.rank if self.network.shares_base else None,
            "height": height,
            "width": width,
            "student_steps": self.steps,
            "arguments": {str(count): arguments for count, arguments in self.arguments.items()},
            "max_sequence_length": self.max_length,
        }


@dataclass
class LoadedStudent:
    """
    Args:
        pipeline: the stock pipeline with the student inside, its weights as the adapter `ADAPTER` or as the network.
        record: what `student.json` says.
    """

    pipeline: DiffusionPipeline
    record: dict[str, Any]

    @property
    def trained_steps(self) -> list[int]:
        """The numbers of steps that the student was trained for, rising."""
        return self.record["student_steps"]

    def arguments(self, steps: int | None = None) -> dict[str, Any]:
        """What a call of the pipeline is given besides the prompt; by default for the largest number of steps.

        Raises:
            InputError: for a number that the student was not trained for.
        """
        steps = self.trained_steps[-1] if steps is None else steps
        if steps not in self.trained_steps:
            known = "one step" if self.trained_steps == [1] else f"{', '.join(map(str, self.trained_steps))} steps"
            raise InputError(
                f"`num_inference_steps` is {steps}, but this student has {known}: it was not trained at other times."
            )
        size = {"height": self.record["height"], "width": self.record["width"]}
        return {**self.record["arguments"][str(steps)], **size}

    def add_lora(self, source: str, name: str, scale: float = 1.0) -> None:
        """Stacks a second adapter on the student.

        Args:
            source: a folder, a file or a repository that the pipeline's `load_lora_weights` reads.
            name: what to call it.
            scale: of its effect.

        Raises:
            InputError: when it cannot be loaded, or there is an adapter of that name.
        """
        present = list({key: None for names in self.pipeline.get_list_adapters().values() for key in names})
        if name in present:
            raise InputError(
                f"There is an adapter called {name!r} already: give the second one another name than {', '.join(present)}."
            )
        try:
            self.pipeline.load_lora_weights(source, adapter_name=name)
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            raise InputError(f"Cannot load the adapter {source!r}: {_first_line(error)}") from error
        self.pipeline.set_adapters([*present, name], [*[1.0] * len(present), scale])

    def images(
        self,
        prompts: Sequence[str],
        steps: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """
        One image for each prompt, by a call of the stock pipeline.

        Args:
            prompts: the texts.
            steps: one of `trained_steps`, by default the largest.
            generators: one for each prompt, on which alone its image depends. (In stock calls of most pipelines the noise
                of a re-noising student is from torch's global generator.)
            height, width: in pixels; the student's own when not given.

        Raises:
            InputError: for a number of steps it was not trained for, or a size that the pipeline does not make.
        """
        arguments = self.arguments(steps)
        arguments |= {name: side for name, side in (("height", height), ("width", width)) if side is not None}
        TextToImageTeacher(self.pipeline, (arguments["height"], arguments["width"]))  # refuses a size
        draws = None if generators is None else list(generators)
        scheduler = self.pipeline.scheduler
        if draws is not None and getattr(scheduler.config, "stochastic_sampling", False):
            scheduler.step = functools.partial(scheduler.step, generator=draws)
        try:
            return self.pipeline(prompt=list(prompts), generator=draws, **arguments).images
        except ValueError as error:
            raise InputError(f"The {type(self.pipeline).__name__} refuses {arguments}: {error}") from error
        finally:
            vars(scheduler).pop("step", None)


def is_text_student(name: str, revision: str | None = None) -> bool:
    """Whether a folder or repository is a student that `load_student` reads."""
    return _find(name, STUDENT, revision) is not None


def load_student(
    name: str | Path, dtype: torch.dtype | None = None, base: str | None = None, revision: str | None = None
) -> LoadedStudent:
    """The student in a folder or repository, with the stock pipeline that it changes.

    Args:
        name: the folder or Hub id.
        dtype: precision of the pipeline.
        base: where the stock pipeline is, when it is no longer where the student was trained.
        revision: commit, tag or branch of a Hub id.

    Raises:
        InputError: when it, or its base, cannot be had, or they do not fit.
    """
    name = str(name)
    folder = _folder(name, revision)
    record = read_student(folder)
    kind = record["pipeline_class"]
    if record["lora_rank"] is None:
        pipeline = load_stock_pipeline(str(folder), dtype)
        _check_class(type(pipeline).__name__, kind, name, "its pipeline")
        return LoadedStudent(pipeline, record)
    wanted, where = base or record["base"], {} if base else {"revision": record["revision"]}
    try:
        pipeline = load_stock_pipeline(wanted, dtype, **where)
    except InputError as error:
        raise InputError(
            f"The student {name!r} is an adapter of the {kind} {wanted!r}, which cannot be loaded. Say where it is now: "
            f"--base FOLDER_OR_REPO (in Python base=…). {error}"
        ) from error
    _check_class(type(pipeline).__name__, kind, name, f"{wanted!r}")
    scheduler = getattr(diffusers, scheduler_class(folder))
    try:
        pipeline.scheduler = scheduler.from_pretrained(folder / "scheduler")
        pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS, adapter_name=ADAPTER)
    except ImportError as error:
        raise InputError(
            f"A LoRA needs the package peft: pip install 'si_distill[text-to-image]' ({error})."
        ) from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise InputError(f"The adapter in {name!r} does not fit {wanted!r}: {_first_line(error)}") from error
    _check_adapter(
        getattr(pipeline, CONVENTIONS[kind].network), folder / LORA_WEIGHTS, CONVENTIONS[kind].network, wanted
    )
    return LoadedStudent(pipeline, record)


def _check_adapter(network: torch.nn.Module, file: Path, prefix: str, base: str) -> None:
    """Refuses an adapter of which a part has no place in the network: diffusers only warns."""
    from peft import get_peft_model_state_dict

    with safe_open(file, "pt") as tensors:
        saved = set(tensors.keys())
    loaded = {f"{prefix}.{key}" for key in get_peft_model_state_dict(network, adapter_name=ADAPTER)}
    if saved != loaded:
        raise InputError(
            f"The adapter {file} does not fit {base!r}: {min(saved ^ loaded)} and {len(saved ^ loaded) - 1} more of its "
            f"{len(saved)} tensors are not those of an adapter of this {type(network).__name__}."
        )


def read_student(folder: Path) -> dict[str, Any]:
    """What the `student.json` of a folder says.

    Raises:
        InputError: when it is damaged or of a class that is not known here.
    """
    path = folder / STUDENT
    record = read_json(path, _SHAPE, "Restore it, or save the student again.")
    steps, kind = record["student_steps"], record["pipeline_class"]
    if kind not in CONVENTIONS:
        raise InputError(
            f"{path} names the pipeline class {kind!r}, which is none of those known here: {', '.join(CONVENTIONS)}."
        )
    if not steps or set(map(str, steps)) != set(record["arguments"]) or min(record["height"], record["width"]) < 1:
        raise InputError(
            f"{path} is damaged: it needs a size in pixels, and arguments for each of its `student_steps` {steps}; it has "
            f"them for {', '.join(record['arguments']) or 'none'}. Restore it, or save the student again."
        )
    for count, given in record["arguments"].items():
        levels = [len(given[name]) for name in ("sigmas", "timesteps") if name in given]
        if given["num_inference_steps"] != int(count) or any(length != int(count) for length in levels):
            raise InputError(
                f"{path} is damaged: its arguments of {count} steps are of another number of steps, {given}."
            )
    unknown = {name for given in record["arguments"].values() for name in given} - {
        key.rstrip("?") for key in _ARGUMENTS
    }
    if unknown:
        raise InputError(f"{path} names the argument {min(unknown)!r}, which no student's call has: it is not used.")
    return record


def scheduler_class(folder: Path) -> str:
    """The name of the stock scheduler in a student's folder.

    Raises:
        InputError: when it is damaged, or of a class that no student has.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    kind = read_json(path, {"_class_name": str}, "Restore it, or save the student again.")["_class_name"]
    known = [cls.__name__ for cls in (FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler)]
    if kind not in known:
        raise InputError(f"{path} names the scheduler {kind!r}; a student has one of {', '.join(known)}.")
    return kind


def _check_class(found: str, wanted: str, name: str, what: str) -> None:
    if found != wanted:
        raise InputError(
            f"The student {name!r} is of a {wanted}, but {what} is a {found}: give the base it was trained on."
        )


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder or repository, or None."""
    here = Path(name)
    if here.is_dir() or (here.parent != Path() and here.parent.is_dir()):  # a mistyped folder is not asked of the Hub
        return here / file if (here / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError, HFValidationError):
        return None


def _folder(name: str, revision: str | None) -> Path:
    """The student's folder; of a repository what is needed of it."""
    found = _find(name, STUDENT, revision)
    if found is None:
        raise InputError(
            f"{name!r} is no text-to-image student: there is no {STUDENT}, neither in a folder nor on the Hub."
        )
    if Path(name).is_dir():
        return Path(name)
    adapter = read_student(found.parent)["lora_rank"] is not None
    files = [STUDENT, LORA_WEIGHTS, "scheduler/*"] if adapter else ["*.json", "*.safetensors", "*.txt", "*.model"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
