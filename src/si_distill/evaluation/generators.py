"""What an evaluation compares: the teacher with each number of steps, the student, and finished images."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..data import DataConfig, ImageDataset
from ..errors import InputError
from ..loading import load_pipeline
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..reading import check_arguments, read_yaml
from .config import EvaluationConfig
from .inputs import Inputs
from .samples import FileSource, InputSource, PipelineSource, Source

Pipeline = InterpolantPipeline | OneStepInterpolantPipeline

#: Seed of the permutation that spreads a part of the training labels over all classes.
LABEL_SEED = 0
#: The solver that `teacher_steps` says nothing about.
ADAPTIVE_SOLVER = "dopri5"


@dataclass
class Generator:
    """One row.

    Args:
        name: as the table shows it.
        kind: `input`, `teacher`, `student` or `images`.
        source: the images.
        facts: how they were made, for the result.
    """

    name: str
    kind: str
    source: Source
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pipelines:
    """The student and the teacher, on the device; each may be missing."""

    student: OneStepInterpolantPipeline | None
    teacher: InterpolantPipeline | None

    @classmethod
    def load(cls, settings: EvaluationConfig, device: torch.device) -> "Pipelines":
        """Loads what the settings name.

        Raises:
            InputError: when one cannot be loaded, or the two make different images.
        """
        kinds = (
            (OneStepInterpolantPipeline, "student", settings.pipeline),
            (InterpolantPipeline, "teacher", settings.teacher),
        )
        trust = settings.trust_remote_code
        found = [load_pipeline(kind, role, name, trust).to(device) if name else None for kind, role, name in kinds]
        shapes = {image_shape(pipeline) for pipeline in found if pipeline}
        classes = {pipeline.network.num_classes for pipeline in found if pipeline}
        if len({pipeline.image_channels for pipeline in found if pipeline}) > 1:
            raise InputError(
                f"Of the student {settings.pipeline!r} and the teacher {settings.teacher!r} one turns images into others "
                "and the other does not: evaluate them one by one."
            )
        if len(shapes) > 1 or len(classes) > 1:
            raise InputError(
                f"The student {settings.pipeline!r} and the teacher {settings.teacher!r} make different images: (channels, "
                f"height, width) {sorted(shapes)}, numbers of classes {sorted(classes)}."
            )
        for pipeline in found:
            if pipeline:
                pipeline.set_progress_bar_config(disable=True)
        return cls(*found)

    @property
    def any(self) -> Pipeline | None:
        return self.student or self.teacher

    @property
    def num_classes(self) -> int:
        """0 without a pipeline or with an unconditional one."""
        return self.any.network.num_classes if self.any else 0


def image_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(C, H, W) of the images that a pipeline makes."""
    shape, vae = pipeline.network.sample_shape, pipeline.vae
    if vae is None:
        return shape
    size = shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    return (vae.config.out_channels, size, size)


def check_images(pipeline: Pipeline, data: ImageDataset, role: str) -> None:
    """Refuses a pipeline whose images have another shape or other classes than the real ones.

    Raises:
        InputError: says what differs; the pipeline is named by its `role`.
    """
    channels, size, _ = image_shape(pipeline)
    if channels > 3 and pipeline.vae is None:
        raise InputError(
            f"The {role} makes latents of {channels} channels, and its folder has no autoencoder to decode them."
        )
    if (channels, size) != (data.channels, data.size):
        raise InputError(
            f"The {role} makes images of {size}×{size} pixels with {channels} channels, but the reference {data.name} has "
            f"{data.channels} channel{'s' if data.channels > 1 else ''} of {data.size}×{data.size}: name your own images "
            "with `data.name`, or set `data.image_size`."
        )
    classes = pipeline.network.num_classes
    if classes and classes != len(data.class_names):
        raise InputError(f"The {role} has {classes} classes and the reference {data.name} has {len(data.class_names)}.")


def balanced_labels(count: int, num_classes: int, training_labels: list[int] | None) -> list[int]:
    """A class for each image.

    Args:
        count: number of images.
        num_classes: K of the generator.
        training_labels: of the data set whose class balance is wanted; None for equally many of each class.

    Returns:
        Labels in [0, K): whole passes through the training labels in their order, and of a last, partial pass a fixed
        random choice, because data sets are often sorted by class.
    """
    if training_labels is None:
        return [i % num_classes for i in range(count)]
    return [training_labels[place] for place in balanced_places(count, len(training_labels))]


def balanced_places(count: int, available: int) -> list[int]:
    """Which of the available images stands behind each of `count`: whole passes in their order, then a fixed random part."""
    whole = count - count % available
    order = torch.randperm(available, generator=torch.Generator().manual_seed(LABEL_SEED)).tolist()
    return [i % available for i in range(whole)] + [order[i] for i in range(count - whole)]


def inputs_of(
    pipeline: Pipeline | None,
    data: ImageDataset | None,
    config: DataConfig,
    count: int,
    seed: int,
    uniform: bool = False,
) -> Inputs | None:
    """What the generated images start from, or None for pipelines that take no images.

    Args:
        pipeline: that is evaluated; None without one.
        data: the images of the settings, if there are any.
        config: the settings.
        count: number of generated images.
        seed: of random masks.
        uniform: whether equally many images of each class were asked for.

    Raises:
        InputError: when the pipeline takes images and the data do not say which.
    """
    if pipeline is None or not pipeline.image_channels:
        return None
    if data is None or not config.has_references or uniform:
        raise InputError(
            "The pipeline turns images into others, so its inputs must be known: set `data` with `data.degradation`, "
            "`data.reference_column` or `data.reference_name`, as in its training, and leave class_balance at data."
        )
    return Inputs(data, config, balanced_places(count, len(data)), seed)


def build_generators(
    settings: EvaluationConfig,
    pipelines: Pipelines,
    files: FileSource | None,
    labels: list[int] | None,
    count: int,
    inputs: Inputs | None = None,
) -> list[Generator]:
    """The rows: inputs, if there are any, teachers, the student with each of its numbers of steps, and finished images last.

    Args:
        settings: the teacher's steps, solvers and guidance; the seed.
        pipelines: loaded.
        files: finished images, if there are any.
        labels: of the generated images; None for unconditional pipelines on noise.
        count: number of generated images.
        inputs: of pipelines that take images.

    Raises:
        InputError: when the teacher refuses a solver or guidance.
    """

    def source(pipeline: Pipeline, **sampler: Any) -> PipelineSource:
        call = partial(pipeline, output_type="pt", **sampler)
        return PipelineSource(pipeline, call, labels, settings.seed, count, sampler, inputs)

    rows: list[Generator] = []
    if inputs is not None:
        facts = {"references": inputs.config.describe_references()}
        rows.append(Generator("input", "input", InputSource(inputs, labels), facts))
    for solver in (settings.solver or [pipelines.teacher.scheduler.solver]) if pipelines.teacher else []:
        # An adaptive solver chooses its own steps.
        for steps in settings.teacher_steps if solver != ADAPTIVE_SOLVER else [None]:
            sampler = {
                "solver": solver,
                "guidance_scale": settings.guidance_scale,
                "guidance_interval": settings.guidance_interval,
                **({} if steps is None else {"num_inference_steps": steps}),
                **({"solver_kwargs": settings.solver_kwargs} if settings.solver_kwargs else {}),
            }
            words = ["teacher"] + ([f"{steps} step{'s' if steps > 1 else ''}"] if steps else [])
            words += [solver] if len(settings.solver) > 1 or not steps else []
            facts = {
                "pipeline": settings.teacher,
                **sampler,
                **run_facts(settings.teacher, pipelines.teacher.transformer),
            }
            rows.append(Generator(", ".join(words), "teacher", source(pipelines.teacher, **sampler), facts))
            try:
                rows[-1].source.read([0])  # what the sampler refuses is said now, not after the rows before it
            except ValueError as error:
                raise InputError(f"The row `{rows[-1].name}` cannot be made: {error}") from error
    if pipelines.student:
        facts = {"pipeline": settings.pipeline, **run_facts(settings.pipeline, pipelines.student.transformer)}
        trained = pipelines.student.trained_steps
        for steps in trained:
            sampler = {} if trained == [1] else {"num_inference_steps": steps}
            name = f"student, {steps} step{'s' if steps > 1 else ''}"
            rows.append(Generator(name, "student", source(pipelines.student, **sampler), {**facts, **sampler}))
    if files:
        rows.append(Generator("images", "images", files, {"images": settings.images}))
    return rows


class _Run:
    """What is looked up of a run's settings."""

    ema_decay: float
    ema_halflife_images: float | None
    objective: str
    max_steps: int
    guidance_scale: float


def run_facts(name: str, network: ModelMixin) -> dict[str, Any]:
    """What a run folder says of a network's weights: which average they are, the student's guidance, the step."""
    facts: dict[str, Any] = {"dtype": str(network.dtype).removeprefix("torch."), "ema": None}
    config = Path(name) / "config.yaml"
    if not config.is_file():
        return facts  # of another make, or from the Hub: nothing is known
    run = read_yaml(config)
    try:
        check_arguments(_Run, run)
    except ValueError as error:
        raise InputError(f"Cannot say how the weights in {name} were made: in {config}, {error}. Correct it.") from None
    if run.get("ema_halflife_images") is not None:
        facts["ema"] = f"half-life of {run['ema_halflife_images']:g} images"
    elif "ema_decay" in run:
        facts["ema"] = f"decay {run['ema_decay']:g}"
    facts |= {key: run[key] for key in ("objective", "max_steps") if key in run}
    if "guidance_scale" in run:  # of the teacher that a student was distilled from
        facts["distilled with guidance_scale"] = run["guidance_scale"]
    return facts
