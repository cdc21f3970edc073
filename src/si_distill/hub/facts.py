"""What is known of a model, read from the files of its folder. Nothing is guessed: what no file says is None."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..evaluation.config import EVALUATION
from ..interpolants import INTERPOLANTS, Interpolant
from ..pipelines.interpolant_pipeline_network import VIEWS, NetworkView

#: Files that a run leaves beside its pipeline and that are published with it.
CONFIG, METRICS, FACTS = "config.yaml", "metrics.jsonl", "facts.json"
STUDENT, TEACHER = "OneStepInterpolantPipeline", "InterpolantPipeline"


@dataclass
class ModelFacts:
    """
    A pipeline folder and, where it is a run's, how the run went.

    Args:
        folder: the pipeline folder.
        pipeline_class: `OneStepInterpolantPipeline` (a student) or another class of ours (a teacher).
        id2label: names of the classes, or None.
        network_class, network, scheduler, vae: class name and configs of the components; `vae` is None for pixels.
        guidance: of a student that is guided inside itself: its `scale` and `channels`.
        parameters: values in the network's weights, from the headers of its files; None without weights.
        settings: config.yaml of the training, or {}.
        metrics: lines of metrics.jsonl, or [].
        recorded: facts.json, what the training noted beyond its settings, or {}.
        evaluation: evaluation.json, or None.
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

    @property
    def is_student(self) -> bool:
        return self.pipeline_class == STUDENT

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
        return teacher.get("name") if teacher.get("source") == "hub" else None


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
    index = _values(folder / "model_index.json")
    if not isinstance(index, dict):
        raise InputError(f"{folder} is not a pipeline folder: it has no model_index.json.")
    name = class_name(index)
    if "transformer" not in index or not isinstance(name, str):
        raise InputError(
            f"{folder} holds {name!r}, which has no `transformer`: only pipelines of si_distill are described."
        )
    vae = _values(folder / "vae" / "config.json") if (index.get("vae") or [None])[0] else None
    facts = ModelFacts(
        folder=folder,
        pipeline_class=name,
        id2label=index.get("id2label"),
        network_class=index["transformer"][1],
        network=_values(folder / "transformer" / "config.json") or {},
        scheduler=_values(folder / "scheduler" / "scheduler_config.json") or {},
        vae=vae,
        parameters=_parameters(folder / "transformer"),
        guidance=index.get("guidance"),
    )
    if training:
        facts.settings = _values(folder / CONFIG) or {}
        facts.metrics = _lines(folder / METRICS)
        facts.recorded = _values(folder / FACTS) or {}
        facts.evaluation = _values(folder / EVALUATION)
    return facts


def class_name(index: dict[str, Any]) -> str | None:
    """The class that a model_index.json names; in a list, its module comes first."""
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) else name


def without_paths(value: Any) -> Any:
    """The same nested value, in which a path of one machine is only its last part: publications tell no home folders."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "file://")):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return value


def _values(path: Path) -> Any:
    """What a JSON or YAML file holds; None without one."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"Cannot read {path}: {error}. Restore it, or remove it.") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # a line cut off by a kill is the last
    return lines


def _parameters(folder: Path) -> int | None:
    """Values of all tensors in the weights without a variant."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.count(".") > 1:
            continue  # a variant: the same tensors again
        try:
            with safe_open(file, framework="pt") as tensors:
                total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"Cannot read the weights {file}: {error}. Save or copy them again.") from error
    return total or None
