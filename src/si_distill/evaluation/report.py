"""Evaluation of students, teachers and finished images against real ones: a JSON file, a table, three pictures."""

import json
import os
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from accelerate import PartialState

from ..data import DataConfig, ImageDataset, load_images
from ..errors import InputError
from ..hub.card import write_card
from ..hub.evaluation_table import format_table
from ..hub.facts import EVALUATION
from ..launching import join_processes
from ..settings import settings_to_dict
from .config import EvaluationConfig
from .features import Extractor, load_extractor
from .generators import (
    Generator,
    Pipelines,
    balanced_labels,
    build_generators,
    check_images,
    image_shape,
    inputs_of,
)
from .inputs import Inputs
from .measures import Judge
from .metrics import DigitsClassifier
from .pictures import COLUMNS_OF_PICTURES, draw_neighbours, draw_quality, draw_samples
from .reference import Reference, check_reference, data_reference, read_reference
from .samples import DatasetSource, FileSource
from .shards import Shards, slug


def evaluate(settings: EvaluationConfig) -> dict[str, Any] | None:
    """Runs the evaluation and writes its files; every process of the launcher calls it.

    Returns:
        The contents of evaluation.json: how it was measured, and `rows`. None on all processes but the first.

    Raises:
        InputError: when a pipeline, the data or the features cannot be loaded, or they do not fit each other.
    """
    started = time.perf_counter()
    state = join_processes()
    output = _output_path(settings)
    with state.main_process_first():  # a download is made once
        extractor = load_extractor(settings.features, settings.feature_weights, state.device)
        # Published statistics stand for the data set, unless its class balance is wanted.
        uses_data = settings.reference is None or settings.class_balance == "data"
        data = load_images(settings.data) if uses_data else None
    pipelines = Pipelines.load(settings, state.device)
    files = FileSource(settings.images, _channels(data, pipelines)) if settings.images else None
    try:
        _check_fits(pipelines, files, data)
    except InputError as error:
        if settings.reference is None:
            raise
        raise InputError(
            f"{error} (`data` gives the balance of classes here; --class_balance uniform does without it.)"
        ) from None

    real = DatasetSource(data, settings_to_dict(settings.data)) if data else None
    cache = Path(settings.cache_dir).expanduser()
    if settings.reference:
        reference = read_reference(Path(settings.reference), extractor.name)
        channels, size = _channels(data, pipelines), _size(pipelines, files)
        check_reference(reference, settings.reference, extractor, channels, size, real)
    else:
        reference = data_reference(real, extractor, cache, state, settings.batch_size)

    count = _count(settings, reference, data, pipelines)
    training_labels = list(data.labels) if settings.class_balance == "data" and data else None
    labels = balanced_labels(count, pipelines.num_classes, training_labels) if pipelines.num_classes else None
    uniform = settings.class_balance == "uniform"
    inputs = inputs_of(pipelines.any, data, settings.data, count, settings.seed, uniform)
    if (
        inputs and data.class_names
    ):  # also where the network has none: what an image shows should be what its input shows
        labels = [data.labels[place] for place in inputs.places]
    is_digits = data is not None and data.name == "sklearn-digits" and data.class_names
    # Trained on all of them, also when the reference is a part.
    classifier = DigitsClassifier(*load_images(DataConfig()).read_all()) if is_digits else None

    generators = build_generators(settings, pipelines, files, labels, count, inputs)
    work = output.with_name(f"{output.stem}_features")
    shards = []
    for generator in generators:
        pictures = output.with_name(f"{output.stem}_{slug(generator.name)}") if settings.save_images else None
        made = Shards(work, generator.source, extractor, classifier, settings.save_npz, pictures)
        made.make(state, settings.batch_size, generator.name)
        shards.append(made)
    if not state.is_main_process:
        return None  # what follows is quick beside the sampling, and needs no other process

    judge = Judge(settings, reference, extractor, real, data.class_names if data else [], state.device)
    rows = [judge.row(generator, made.collect()) for generator, made in zip(generators, shards, strict=True)]
    if reference.features is not None:
        rows.append(judge.floor())
    if settings.save_npz:
        for generator, made in zip(generators, shards, strict=True):
            made.write_npz(output.with_name(f"{output.stem}_{slug(generator.name)}.npz"))
    result = {
        **_how(settings, extractor, reference, data, state),
        "intervals": f"95 %, bootstrap of generated images, {judge.resamples} resamples; recall: of real ones",
        "num_samples": count,
        "classifier": classifier.name if classifier else None,
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    _write(result, generators, judge, real, inputs, output)
    _forget_others(work, shards)
    if output.name == EVALUATION and (output.parent / "model_index.json").exists():
        write_card(output.parent)
    return result


def _write(
    result: dict[str, Any],
    generators: list[Generator],
    judge: Judge,
    real: DatasetSource | None,
    inputs: Inputs | None,
    output: Path,
) -> None:
    for suffix, text in (
        (".json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
        (".md", format_table(result) + "\n"),
    ):
        partial = output.with_suffix(".tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output.with_suffix(suffix))
    if any(row["network evaluations"] and row["Fréchet distance"] is not None for row in result["rows"]):
        draw_quality(result, output.with_name(f"{output.stem}_quality.png"))
    labels = generators[-1].source.labels
    names = judge.class_names
    if labels is None or not names:
        chosen = list(range(min(len(generators[-1].source), COLUMNS_OF_PICTURES)))
        titles = None
    else:
        chosen = [labels.index(c) for c in range(min(len(names), COLUMNS_OF_PICTURES)) if c in labels]
        titles = [names[labels[i]].split(",")[0] for i in chosen]
    pictures = [(g.name, g.source.read([i for i in chosen if i < len(g.source)]).images) for g in generators]
    if inputs and inputs.config.is_paired:
        pictures.append(("truth", inputs.truth(chosen)))
    elif real:
        wanted = [labels[i] for i in chosen] if titles else []
        places = [real.labels.index(c) for c in wanted if c in real.labels] or chosen
        pictures.append(("real", real.read([i for i in places if i < len(real)]).images))
    draw_samples(pictures, titles, output.with_suffix(".png"))
    if real and judge.neighbours is not None and judge.reference.indices is not None:
        draw_neighbours(
            generators[-1].source,
            real,
            judge.reference.indices.tolist(),
            judge.neighbours,
            chosen,
            output.with_name(f"{output.stem}_neighbours.png"),
        )


def _how(
    settings: EvaluationConfig,
    extractor: Extractor,
    reference: Reference,
    data: ImageDataset | None,
    state: PartialState,
) -> dict[str, Any]:
    """How the figures were measured."""
    cuda = state.device.type == "cuda"
    balance = settings.class_balance
    return {
        "evaluator": f"torch-fidelity {torch_fidelity.__version__}",
        "distance": extractor.distance_name,
        "features": extractor.identity,
        "reference": {
            "name": reference.name,
            "split": None if settings.reference else settings.data.split,
            "images": reference.count,
            "resolution": reference.manifest.get("resolution"),
            "file": settings.reference,
            "probe": reference.manifest.get("source", {}).get("probe"),
        },
        "class_balance": f"as in {data.name}" if balance == "data" and data else balance,
        "seed": settings.seed,
        "kid": f"mean and standard deviation of {settings.kid_subsets} subsets of up to 1,000",
        "student": settings.pipeline,
        "teacher": settings.teacher,
        "images": settings.images,
        "guidance_scale": settings.guidance_scale if settings.teacher else None,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": state.num_processes,
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _count(settings: EvaluationConfig, reference: Reference, data: ImageDataset | None, pipelines: Pipelines) -> int:
    count = settings.num_samples or reference.count or (len(data) if data else None)
    if count is None and pipelines.any:
        raise InputError(f"The reference {settings.reference} does not say how many images it has: set `num_samples`.")
    return count or 0


def _channels(data: ImageDataset | None, pipelines: Pipelines) -> int:
    if data:
        return data.channels
    return image_shape(pipelines.any)[0] if pipelines.any else 3


def _size(pipelines: Pipelines, files: FileSource | None) -> int:
    return image_shape(pipelines.any)[-1] if pipelines.any else files.size


def _check_fits(pipelines: Pipelines, files: FileSource | None, data: ImageDataset | None) -> None:
    """Refuses images of another shape or other classes than the real ones."""
    if pipelines.any and files and image_shape(pipelines.any)[-1] != files.size:
        raise InputError(
            f"The pipeline makes images of {image_shape(pipelines.any)[-1]} pixels and the finished images have "
            f"{files.size}."
        )
    if data is None:
        return
    if files and files.size != data.size:
        raise InputError(
            f"The finished images have {files.size}×{files.size} pixels and the reference {data.name} has "
            f"{data.size}×{data.size}: set `data.image_size`."
        )
    if pipelines.any:
        check_images(pipelines.any, data, "student" if pipelines.student else "teacher")


def _output_path(settings: EvaluationConfig) -> Path:
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


def _forget_others(work: Path, shards: list[Shards]) -> None:
    """Deletes features that no row of this result uses: those of weights that were since trained on, for instance."""
    used = {made.folder for made in shards}
    for folder in work.iterdir():
        if folder.is_dir() and folder not in used:
            shutil.rmtree(folder, ignore_errors=True)
