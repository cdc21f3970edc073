"""Evaluation of a student, its teacher and the real data: one table, one JSON file, one picture."""

import json
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_fidelity

from ..data import ImageDataset, load_images
from ..errors import InputError
from ..hub.card import write_card
from ..loading import load_pipeline
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..visualization import image_grid, tensor_to_pil
from .config import EvaluationConfig
from .generation import generate_images
from .metrics import DigitsClassifier, frechet_distance

COLUMNS = ("generator", "network evaluations", "Fréchet distance", "label accuracy", "images per second")


def evaluate(settings: EvaluationConfig) -> dict[str, Any]:
    """Runs the evaluation and writes its files.

    Returns:
        The contents of evaluation.json: how it was measured, and `rows`.

    Raises:
        InputError: when a pipeline or the data cannot be loaded, or they do not fit each other.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_pipeline(OneStepInterpolantPipeline, "student", settings.pipeline).to(device)
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher).to(device) if settings.teacher else None
    data = load_images(settings.data)
    _check_fits(student, data)
    output = _output_path(settings)

    reference, reference_labels = data.read_all()
    count = settings.num_samples or len(reference)
    labels = [reference_labels[i % len(reference_labels)] for i in range(count)]
    conditional = student.network.num_classes > 0
    is_digits = settings.data.name == "digits"
    classifier = DigitsClassifier(reference, reference_labels) if is_digits and conditional else None

    generators = [
        (
            f"teacher, {steps} step{'s' if steps > 1 else ''}",
            teacher,
            partial(
                teacher,
                num_inference_steps=steps,
                solver=settings.solver,
                guidance_scale=settings.guidance_scale,
                output_type="pt",
            ),
        )
        for steps in (settings.teacher_steps if teacher else [])
    ]
    generators.append(("student, 1 step", student, partial(student, output_type="pt")))

    rows: list[dict[str, Any]] = []
    pictures = []
    if conditional:
        chosen = [labels.index(c) for c in range(min(len(data.class_names), 10)) if c in labels]
    else:
        chosen = list(range(min(count, 10)))
    for name, pipeline, call in generators:
        pipeline.set_progress_bar_config(disable=True)
        made = generate_images(pipeline, call, labels, settings.seed, settings.batch_size, name)
        row = {
            "generator": name,
            "network evaluations": made.evaluations,
            "Fréchet distance": frechet_distance(made.images, reference),
            "label accuracy": classifier.accuracy(made.images, labels)
            if classifier and pipeline.network.num_classes
            else None,
            "images per second": made.images_per_second,
        }
        rows.append(row)
        pictures.append((name, made.images[chosen]))
    rows.append(_floor(reference, settings.seed))
    real = [reference_labels.index(labels[i]) for i in chosen] if conditional else chosen
    pictures.append(("real", reference[real]))

    result = {
        "evaluator": f"torch-fidelity {torch_fidelity.__version__}",
        "features": "pixels: uint8 / 127.5 - 1, flattened (not Inception; not comparable with any FID)",
        "classifier": classifier.name if classifier else None,
        "reference": {"name": data.name, "split": settings.data.split, "images": len(reference)},
        "num_samples": count,
        "seed": settings.seed,
        "labels": "those of the reference images, in order" if conditional else None,
        "student": settings.pipeline,
        "teacher": settings.teacher,
        "solver": settings.solver,
        "guidance_scale": settings.guidance_scale,
        "dtype": str(student.transformer.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    image_grid(
        [tensor_to_pil(images.float() / 127.5 - 1) for _, images in pictures],
        [name for name, _ in pictures],
        [data.class_names[labels[i]].split(",")[0] for i in chosen] if conditional else None,
    ).save(output.with_suffix(".png"))
    if output == Path(settings.pipeline) / "evaluation.json":
        write_card(settings.pipeline)
    return result


def format_table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, with a line that says how they were measured."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in result["rows"]:
        cells = [
            row["generator"],
            "" if row["network evaluations"] is None else f"{row['network evaluations']:g}",
            f"{row['Fréchet distance']:.3f}",
            "" if row["label accuracy"] is None else f"{row['label accuracy']:.3f}",
            "" if row["images per second"] is None else f"{row['images per second']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n{result['evaluator']}; features {result['features']}; {result['num_samples']} samples, seed {result['seed']}, "
        f"reference {result['reference']['name']} ({result['reference']['images']} images); {result['device']}."
    )
    return "\n".join(lines)


def _check_fits(student: OneStepInterpolantPipeline, data: ImageDataset) -> None:
    (channels, size, _), classes, vae = student.network.sample_shape, student.network.num_classes, student.vae
    size *= 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    if size != data.size or (vae is None and channels != data.channels):
        raise InputError(
            f"The student makes images of {size}×{size} pixels with {channels} channels in its space, but "
            f"the reference {data.name} has {data.channels} channels of {data.size}×{data.size}: set `data.image_size`."
        )
    if classes and classes != len(data.class_names):
        raise InputError(
            f"The student has {classes} classes and the reference {data.name} has {len(data.class_names)}."
        )


def _output_path(settings: EvaluationConfig) -> Path:
    if settings.output:
        path = Path(settings.output)
    elif Path(settings.pipeline).is_dir():
        path = Path(settings.pipeline) / "evaluation.json"
    else:
        path = Path("evaluation.json")
    if not path.parent.is_dir():
        raise InputError(f"The folder of `output` {path} does not exist.")
    return path


def _floor(reference: torch.Tensor, seed: int) -> dict[str, Any]:
    """Real images against real images: what no generator can be expected to beat at half of the sample size."""
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    half = len(reference) // 2
    distance = frechet_distance(reference[order[:half]], reference[order[half:]])
    return {
        "generator": "real half against real half",
        "network evaluations": None,
        "Fréchet distance": distance,
        "label accuracy": None,
        "images per second": None,
    }
