"""What is known of a model, read from the files of its folder. Nothing is guessed: what no file says is None."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..evaluation.config import EVALUATION
from ..interpolants import INTERPOLANTS, Interpolant
from ..pipelines.interpolant_pipeline_network import VIEWS, NetworkView
from ..reading import read_json, read_json_lines, read_yaml
from ..text_to_image.conventions import CONVENTIONS
from ..text_to_image.lora import LORA_WEIGHTS
from ..text_to_image.student import STUDENT as TEXT_STUDENT
from ..text_to_image.student import read_student
from .plain_text import is_repository

#: Files that a run leaves next to its pipeline and that are published with it.
CONFIG, METRICS, FACTS = "config.yaml", "metrics.jsonl", "facts.json"
STUDENT, TEACHER = "OneStepInterpolantPipeline", "InterpolantPipeline"

# What these files must hold where they say something at all (see `read_json`).
_NUMBER, _TEXT, _COUNT = (float, None), (str, None), (int, None)
INDEX = {
    "_class_name?": (str, [str]),
    "transformer?": [(str, None)],
    "vae?": ([(str, None)], None),
    "id2label?": ({str: str}, None),
    "guidance?": ({"scale?": _NUMBER, "channels?": _COUNT}, None),
}
_NETWORK = {
    "sample_size?": (int, [int], None),
    "in_channels?": _COUNT,
    "num_classes?": _COUNT,
    "num_embeds_ada_norm?": _COUNT,
    "num_class_embeds?": _COUNT,
    "condition_channels?": _COUNT,
    "class_dropout_prob?": _NUMBER,
}
_SCHEDULER = {
    "interpolant?": _TEXT,
    "interpolant_kwargs?": (dict, None),
    "prediction_type?": _TEXT,
    "timestep_type?": _TEXT,
    "solver?": _TEXT,
    "init_time?": _NUMBER,
    "student_steps?": ([int], None),
    "timestep_shift?": _NUMBER,
    "noise_channels?": _COUNT,
}
_VAE = {"_class_name?": _TEXT, "block_out_channels?": ([int], None)}
_METRIC = {"step?": int, "images?": float, "images_per_second?": _NUMBER}
_SESSION = {"command?": ([str], None), "processes?": int, "hardware?": _TEXT, "versions?": ({str: _TEXT}, None)}
_RECORDED = {
    "teacher?": (
        {
            "name?": _TEXT,
            "source?": _TEXT,
            "revision?": _TEXT,
            "network?": ({"class": str, "parameters": int}, None),
        },
        None,
    ),
    "data?": ({"name": str, "source?": _TEXT, "split": _TEXT, "images": _COUNT}, None),
    "sessions?": ([_SESSION], None),
    "objective_space?": _TEXT,
}
_EVALUATION = {
    "rows?": [{"generator": str, "made?": (dict, None), "intervals?": (dict, None), "per class?": ({str: dict}, None)}],
    "reference?": (dict, None),
    "features?": dict,
}


@dataclass
class ModelFacts:
    """
    A pipeline folder and, where it is a run's, how the run went.

    Args:
        folder: the pipeline folder.
        pipeline_class: `OneStepInterpolantPipeline` (a student) or another class of ours (a teacher); of a text-to-image
            student the stock class.
        id2label: names of the classes, or None.
        network_class, network, scheduler, vae: class name and configs of the components; `vae` is None for pixels.
        guidance: of a student that is guided inside itself: its `scale` and `channels`.
        parameters: values in the network's weights, from the headers of its files; None without weights.
        settings: config.yaml of the training, or {}.
        metrics: lines of metrics.jsonl, or [].
        recorded: facts.json, what the training noted beyond its settings, or {}.
        evaluation: evaluation.json, or None.
        texts: student.json of a text-to-image student, or None.
    """

    folder: Path
    pipeline_class: str
    id2label: dict[str, str] | None
    network_class: str
    network: dict[str, Any]
    scheduler: dict[str, Any]
    vae: dict[str, Any] | None
    parameters: int | None
    guidance: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    recorded: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    texts: dict[str, Any] | None = None

    @property
    def trained_steps(self) -> list[int]:
        """The numbers of steps that a student was trained for."""
        return list((self.texts or self.scheduler).get("student_steps") or [1])

    @property
    def is_student(self) -> bool:
        return self.texts is not None or self.pipeline_class == STUDENT

    @property
    def num_classes(self) -> int | None:
        """0 for an unconditional network; None when its config does not say. Diffusers' own classes call it otherwise."""
        views = {cls.__name__: view for cls, view in VIEWS.items()}
        value = self.network.get(views.get(self.network_class, NetworkView).classes_name)
        return 0 if value is None and self.network_class in views else value

    @property
    def interpolant(self) -> type[Interpolant] | None:
        """The family; None of one that is not registered here."""
        return INTERPOLANTS.get(self.scheduler.get("interpolant"))

    @property
    def starts_from_image(self) -> bool:
        """Whether sampling starts at an image: a bridge."""
        return self.interpolant is not None and not self.interpolant.gaussian_reference

    @property
    def takes_image(self) -> bool:
        """Whether each call is given an image: what a bridge starts from, or a network on noise sees."""
        return self.starts_from_image or bool(self.network.get("condition_channels"))

    @property
    def images_seen(self) -> int | None:
        """Samples over all updates of the trained network, by the last line of metrics.jsonl."""
        return self.metrics[-1].get("images") if self.metrics else None

    @property
    def steps(self) -> int | None:
        return self.metrics[-1].get("step") if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Time in iterations (without saving and sampling): each line's images by its rate. A resumed run drops the lines
        that it repeats, so they are not counted twice.
        """
        total, before = 0.0, 0
        for line in self.metrics:
            rate = line.get("images_per_second")
            if not rate or "images" not in line:
                return None
            total, before = total + (line["images"] - before) / rate, line["images"]
        return total if self.metrics else None

    @property
    def teacher_repository(self) -> str | None:
        """The teacher's Hub id, if the run loaded it from the Hub. A name that looks like one may be a local folder."""
        teacher = self.recorded.get("teacher") or {}
        known = teacher.get("source") == "hub" and is_repository(teacher.get("name"))
        return teacher["name"] if known else None


def read_facts(folder: str | Path, training: bool = True) -> ModelFacts:
    """
    Reads a pipeline folder.

    Args:
        folder: of a pipeline; a run's folder is one.
        training: whether to read what the run and its evaluation left there; False for weights that are not theirs.

    Raises:
        InputError: when the folder is no pipeline of ours, or one of its files cannot be read.
    """
    folder = Path(folder)
    facts = (_text_facts if (folder / TEXT_STUDENT).is_file() else _pipeline_facts)(folder)
    if training:
        facts.settings = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        facts.metrics = list(read_json_lines(folder / METRICS, _METRIC)) if (folder / METRICS).is_file() else []
        facts.recorded = _json(folder / FACTS, _RECORDED) or {}
        facts.evaluation = _json(folder / EVALUATION, _EVALUATION)
    return facts


def _text_facts(folder: Path) -> ModelFacts:
    record = read_student(folder)
    network = CONVENTIONS[record["pipeline_class"]].network
    adapter = record["lora_rank"] is not None
    if adapter and not (folder / LORA_WEIGHTS).is_file():
        raise InputError(f"{folder} lacks its weights, {LORA_WEIGHTS}: restore them, or save the student again.")
    return ModelFacts(
        folder=folder,
        pipeline_class=record["pipeline_class"],
        id2label=None,
        network_class=network,
        network={},
        scheduler=_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": str}) or {},
        vae=None,
        parameters=_parameters(folder if adapter else folder / network),
        texts=record,
    )


def _pipeline_facts(folder: Path) -> ModelFacts:
    index = _json(folder / "model_index.json", INDEX)
    if index is None:
        raise InputError(f"{folder} is not a pipeline folder: it has no model_index.json.")
    name = class_name(index)
    network = (index.get("transformer") or [None])[-1]
    if not all(isinstance(part, str) and part.isidentifier() for part in (name, network)):
        raise InputError(
            f"{folder} holds {name!r}, which has no `transformer`: only pipelines of si_distill are described."
        )
    vae = _json(folder / "vae" / "config.json", _VAE) if (index.get("vae") or [None])[0] else None
    return ModelFacts(
        folder=folder,
        pipeline_class=name,
        id2label=index.get("id2label"),
        network_class=network,
        network=_json(folder / "transformer" / "config.json", _NETWORK) or {},
        scheduler=_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER) or {},
        vae=vae,
        parameters=_parameters(folder / "transformer"),
        guidance=index.get("guidance"),
    )


def cached_blobs(folder: Path) -> Path | None:
    """What the links in a snapshot of the Hub's cache, `models--…/snapshots/COMMIT`, lead to; None of another folder."""
    *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
    cached = repository.startswith("models--") and snapshots == "snapshots" and re.fullmatch("[0-9a-f]{40}", commit)
    return folder.resolve().parents[1] / "blobs" if cached else None


def class_name(index: dict[str, Any]) -> str | None:
    """The class that a model_index.json names; in a list, its module comes first."""
    name = index.get("_class_name")
    return (name or [None])[-1] if isinstance(name, list) else name


def _json(path: Path, shape: Any) -> Any:
    return read_json(path, shape) if path.exists() else None


def _parameters(folder: Path) -> int | None:
    """Values of all tensors in the weights without a variant."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.count(".") > 1:
            continue  # a variant: the same tensors again
        try:
            with safe_open(file, framework="pt") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"Cannot read the weights {file}: {error}. Save or copy them again.") from error
    return total or None
