"""What an evaluation compares with what: everything loaded, and checked to fit, before the first image is made."""

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from accelerate import PartialState

from ..data import load_images
from ..errors import InputError
from ..files import FolderLock, refuse_links
from ..settings import settings_to_dict
from .classifier import classifier_of
from .config import EVALUATION, EvaluationConfig
from .features import load_extractor
from .generators import Pipelines, balanced_labels, build_generators, check_images, image_shape, inputs_of
from .neighbours import Neighbours
from .pictures import COLUMNS_OF_PICTURES, draw_neighbours, draw_quality, draw_samples
from .prompts import Prompts
from .reference import Reference, check_reference, data_reference, read_reference
from .samples import DatasetSource, FileSource
from .scores import Scorer
from .shards import Shards, slug


class Evaluation:
    """What is compared with what: images of classes, or of none. `TextEvaluation` is that of prompts."""

    prompts: Prompts | None = None
    scorers: dict[str, Scorer] = {}
    reference: Reference | None

    def __init__(self, settings: EvaluationConfig, state: PartialState):
        self.settings, self.state, self.output = settings, state, output_path(settings)
        #: Of the features; others of the same folder may be evaluated at the same time, and trained.
        self.lock = FolderLock(self.next_to("_features"))
        self._check_writes((".json", ".md", ".png", "_quality.png", "_neighbours.png"), ("_features",))
        self.lock.check()
        self._load()
        names = [f"_{slug(generator.name)}" for generator in self.generators]
        self._check_writes(
            [f"{name}.npz" for name in names if settings.save_npz], names if settings.save_images else []
        )

    def _load(self) -> None:
        settings, state = self.settings, self.state
        with state.main_process_first():  # a download is made once
            self.extractor = load_extractor(settings.features, settings.feature_weights, state.device)
            # Published statistics stand for the data set, unless its class balance is wanted.
            uses_data = settings.reference is None or settings.class_balance == "data"
            self.data = data = load_images(settings.data) if uses_data else None
        self.class_names = data.class_names if data else []
        self.pipelines = Pipelines.load(settings, state.device)
        self.shape = image_shape(self.pipelines.any) if self.pipelines.any else None
        #: Of the images: grey finished images become RGB if the real ones are.
        self.channels = data.channels if data else self.shape[0] if self.shape else 3
        self.files = FileSource(settings.images, self.channels) if settings.images else None
        self._check_fits()
        self.real = DatasetSource(data, settings_to_dict(settings.data)) if data else None
        self.reference = self._load_reference()
        self.count = settings.num_samples or self.reference.count or (len(data) if data else 0)
        if not self.count and self.shape:
            raise InputError(
                f"The reference {settings.reference} does not say how many images it has: set `num_samples`."
            )
        uniform = settings.class_balance == "uniform"
        self.inputs = inputs_of(self.pipelines.any, data, settings.data, self.count, settings.seed, uniform)
        self.generators = build_generators(
            settings, self.pipelines, self.files, self._labels(), self.count, self.inputs
        )
        self.classifier = classifier_of(data)

    def _check_writes(self, files: Iterable[str], folders: Iterable[str]) -> None:
        """Refuses links, and folders in place of files, among what is written next to the output."""
        for endings, kind in ((files, Path.is_file), (folders, Path.is_dir)):
            for path in map(self.next_to, endings):
                refuse_links(path.parent, (path.name,))
                if path.exists() and not kind(path):
                    wanted = "a file" if kind is Path.is_file else "a folder"
                    raise InputError(f"{path} is to be written and is not {wanted}: move it, or give another `output`.")

    def claim(self) -> None:
        """Takes the folder of the features for this evaluation until `lock.release`; the main process does, for all."""
        if self.state.is_main_process:
            try:
                self.lock.acquire()
            except OSError as error:
                raise InputError(f"Cannot write {self.lock.file}: {error.strerror}. Give another `output`.") from error

    def _check_fits(self) -> None:
        """Refuses images of another shape or other classes than the real ones."""
        files, data, pipelines = self.files, self.data, self.pipelines
        shown = f"{files.width}×{files.height}" if files else ""
        if self.shape and files and self.shape[1:] != (files.height, files.width):
            height, width = self.shape[1:]
            raise InputError(
                f"The pipeline makes images of {width}×{height} pixels and the finished images have {shown}."
            )
        try:
            if data and files and (files.width, files.height) != (data.size, data.size):
                raise InputError(
                    f"The finished images have {shown} pixels and the reference {data.name} has "
                    f"{data.size}×{data.size}: set `data.image_size`."
                )
            if data and pipelines.any:
                check_images(pipelines.any, data, "student" if pipelines.student else "teacher")
        except InputError as error:
            if self.settings.reference is None:
                raise
            raise InputError(
                f"{error} (`data` gives the balance of classes here; --class_balance uniform does without it.)"
            ) from None
        if files and len(files) < 2:
            raise InputError(
                f"{files.path} holds one image, and the figures are of many: give at least 2, better thousands."
            )
        classes = len(data.class_names) if data and data.class_names else pipelines.num_classes
        if classes and files and files.labels and not 0 <= min(files.labels) <= max(files.labels) < classes:
            raise InputError(
                f"The labels in {files.path} run from {min(files.labels)} to {max(files.labels)}, but there are {classes} "
                f"classes, 0 to {classes - 1}: leave `arr_1` out, or give the `data` that the classes are of."
            )

    def _load_reference(self) -> Reference:
        """The statistics to compare with: those of a file, or of the data set."""
        s, extractor = self.settings, self.extractor
        if not s.reference:
            return data_reference(self.real, extractor, Path(s.cache_dir).expanduser(), self.state, s.batch_size)
        reference = read_reference(Path(s.reference), extractor.name)
        height, size = self.shape[1:] if self.shape else (self.files.height, self.files.width)
        check_reference(reference, s.reference, extractor, self.channels, size, self.real, height)
        return reference

    def _labels(self) -> list[int] | None:
        """The class of each image; None for unconditional pipelines on noise."""
        if (
            self.inputs and self.class_names
        ):  # also where the network has none: an image should show what its input shows
            return [self.data.labels[place] for place in self.inputs.places]
        if not self.pipelines.num_classes:
            return None
        training_labels = list(self.data.labels) if self.settings.class_balance == "data" and self.data else None
        return balanced_labels(self.count, self.pipelines.num_classes, training_labels)

    def make_features(self) -> list[Shards]:
        """Makes the images of all rows, and keeps those that are wanted; collective."""
        s, shards = self.settings, []
        for generator in self.generators:
            pictures = self.next_to(f"_{slug(generator.name)}") if s.save_images else None
            work, source = self.next_to("_features"), generator.source
            wanted = (self.classifier, s.save_npz, pictures, self.prompts, self.scorers)
            shards.append(Shards(work, source, self.extractor, *wanted))
            shards[-1].make(self.state, s.batch_size, generator.name)
        return shards

    def next_to(self, ending: str) -> Path:
        """A file or folder next to the output."""
        return self.output.with_name(self.output.stem + ending)

    def how(self) -> dict[str, Any]:
        """How the figures are measured."""
        s = self.settings
        cuda = self.state.device.type == "cuda"
        return {
            "evaluator": f"torch-fidelity {torch_fidelity.__version__}",
            "distance": self.extractor.distance_name,
            "features": self.extractor.identity,
            "reference": self.reference and self._how_real(self.reference),
            "class_balance": f"as in {self.data.name}" if s.class_balance == "data" and self.data else s.class_balance,
            "seed": s.seed,
            "kid": f"mean and standard deviation of {s.kid_subsets} subsets of up to 1,000",
            "student": s.pipeline,
            "teacher": s.teacher,
            "images": s.images,
            "guidance_scale": s.guidance_scale if s.teacher else None,
            "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
            "processes": self.state.num_processes,
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }

    def _how_real(self, reference: Reference) -> dict[str, Any]:
        s = self.settings
        return {
            "name": reference.name,
            "split": None if s.reference else s.data.split,
            "images": reference.count,
            "resolution": reference.manifest.get("resolution"),
            "file": s.reference,
            "probe": reference.manifest.get("source", {}).get("probe"),
        }

    def draw(self, result: dict[str, Any], neighbours: Neighbours | None) -> None:
        """The pictures; `neighbours` are those of the last generator."""
        if any(row["network evaluations"] and row["Fréchet distance"] is not None for row in result["rows"]):
            draw_quality(result, self.next_to("_quality.png"))
        chosen, titles = self._shown()
        pictures = [(g.name, g.source.read([i for i in chosen if i < len(g.source)]).images) for g in self.generators]
        draw_samples(pictures + self._shown_real(chosen), titles, self.output.with_suffix(".png"))
        if self.real and neighbours is not None and self.reference.indices is not None:
            indices, path = self.reference.indices.tolist(), self.next_to("_neighbours.png")
            draw_neighbours(self.generators[-1].source, self.real, indices, neighbours, chosen, path)

    def _shown(self) -> tuple[list[int], list[str] | None]:
        """Which images a picture shows, and the titles of its columns."""
        last, names = self.generators[-1].source, self.class_names
        if last.labels is None or not names:
            return list(range(min(len(last), COLUMNS_OF_PICTURES))), None
        chosen = [last.labels.index(c) for c in range(min(len(names), COLUMNS_OF_PICTURES)) if c in last.labels]
        return chosen, [names[last.labels[i]].split(",")[0] for i in chosen]

    def _shown_real(self, chosen: list[int]) -> list[tuple[str, torch.Tensor]]:
        """The row of real images below the chosen ones, if there are any."""
        labels, real = self.generators[-1].source.labels, self.real
        if self.inputs and self.inputs.config.is_paired:
            return [("truth", self.inputs.truth(chosen))]
        if not real:
            return []
        wanted = [labels[i] for i in chosen] if labels is not None and self.class_names else []
        places = [real.labels.index(c) for c in wanted if c in real.labels] or chosen
        return [("real", real.read([i for i in places if i < len(real)]).images)]


def output_path(settings: EvaluationConfig) -> Path:
    """Where the results go: `output`, or evaluation.json in the first pipeline's folder."""
    folders = [name for name in (settings.pipeline, settings.teacher) if name and Path(name).is_dir()]
    if settings.output:
        path = Path(settings.output)
        if path.suffix != ".json":
            raise InputError(f"`output` {path} must end in .json; the table and the pictures are written next to it.")
    else:
        path = Path(folders[0]) / EVALUATION if folders else Path(EVALUATION)
    if not path.parent.is_dir():
        raise InputError(f"The folder of `output` {path} does not exist.")
    return path
