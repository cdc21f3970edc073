"""Generates images with a student of one or a few steps: one picture with titles, or a file for each image.

    si-distill generate --pipeline runs/digits-student --labels 3 7 --out grid.png
    si-distill generate --pipeline runs/digits-student --labels 3 7 --images_per_label 8 --seed 1 --out images/
    si-distill generate --pipeline user/student --revision 0123abc --labels goldfish --dtype bfloat16 --out fish.png
    si-distill generate --pipeline runs/digits-student --teacher runs/digits-teacher --out both.png
    si-distill generate --pipeline runs/sd35-turbo --prompts "a red fox in the snow" --num_inference_steps 4 --out fox.png
    si-distill generate --pipeline runs/digits-superres-student --image small/*.png --out large.png

A class is a number or a name; quote names that hold spaces. A student that turns images into others takes --image, files of
one size; with classes, one of --labels for each, or one for all. A text-to-image student, or a stock pipeline that is a
teacher, takes --prompts or --prompts_file. An --out that ends with / (or is a folder) takes single files.
"""

import re
import typing
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..settings import TRUST, parse_settings, script_main, setting


@dataclass
class GenerateConfig:
    pipeline: str = setting("", "The student: a pipeline folder or a Hub id.")
    revision: str | None = setting(None, "Commit, tag or branch of a Hub id; a commit cannot change later.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    teacher: str | None = setting(None, "Its teacher: the picture then has rows of both, from the same noise.")
    teacher_steps: int = setting(20, "Steps of the teacher.")
    labels: list[str] = setting([], "Classes by number or name; when not given, ten spread over all.")
    image: list[str] = setting([], "Image files that a student starts from, where it does.")
    images_per_label: int = setting(8, "Images of each class, of an unconditional student, or of each --image.")
    seed: int = setting(0, "Image n of every class is drawn from seed + n, on any device.")
    num_inference_steps: int | None = setting(
        None, "Steps of a student that was trained for several numbers of them; its largest when not given."
    )
    prompts: list[str] = setting([], "Texts, each in quotation marks; of a text-to-image pipeline.")
    prompts_file: str | None = setting(None, "A text file with a prompt on each line.")
    num_images_per_prompt: int = setting(1, "Images of each prompt.")
    height: int | None = setting(None, "Height in pixels; when not given, that of the training or the pipeline's own.")
    width: int | None = setting(None, "Width in pixels.")
    guidance_scale: float | None = setting(None, "Of a stock pipeline, instead of its own; a student needs none.")
    base: str | None = setting(None, "The stock pipeline that a student is an adapter of, if it has moved.")
    lora: str | None = setting(None, "A second LoRA that is stacked on a text-to-image student: a folder or a Hub id.")
    lora_scale: float = setting(1.0, "Scale of the second LoRA.")
    batch_size: int | None = setting(None, "Images generated at once; by default 64, of a text-to-image pipeline 4.")
    dtype: str = setting("float32", "Precision of the network.", ("float32", "bfloat16", "float16"))
    device: str | None = setting(None, "`cuda`, `cuda:1`, `cpu`, …; a GPU when there is one.")
    out: str = setting("grid.png", "The picture's file, or the folder of single files.")


#: Settings of pipelines that are told texts, and of the others.
_TEXT = (
    *("prompts", "prompts_file", "num_images_per_prompt", "height", "width", "guidance_scale"),
    *("base", "lora", "lora_scale"),
)
_CLASSES = ("labels", "image", "images_per_label", "teacher", "teacher_steps", "trust_remote_code")


def main(argv: list[str]) -> None:
    settings = parse_settings(GenerateConfig, argv, __doc__)

    import torch

    from ..places import check_place
    from ..settings import LARGEST_SEED, MOST_SAMPLES, at_least
    from ..text_to_image.student import is_text_student
    from ..text_to_image.teacher import is_text_to_image

    for name in ("images_per_label", "num_images_per_prompt", "batch_size", "teacher_steps", "num_inference_steps"):
        if getattr(settings, name) is not None:
            at_least(name, getattr(settings, name), 1, MOST_SAMPLES)
    at_least("seed", settings.seed, 0, LARGEST_SEED)
    out = Path(settings.out)
    singly = settings.out.endswith("/") or out.is_dir()
    if not settings.pipeline:
        raise InputError("Give --pipeline FOLDER_OR_REPO.")
    if not singly and not (out.parent.is_dir() and out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")):
        raise InputError(
            f"`out` is {settings.out!r}: give a .png, .jpg or .webp file in a folder that exists, or a folder/."
        )
    if singly and out.exists() and not out.is_dir():
        raise InputError(f"`out` {out} is a file: give a folder, or a name without the / at its end.")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # which `meta` has not
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`device` {device!r} cannot be used: {str(error).splitlines()[0]}") from None

    for role in ("pipeline", "teacher"):
        if name := getattr(settings, role):
            check_place(role, name)
    student = is_text_student(settings.pipeline, settings.revision)
    if student or is_text_to_image(settings.pipeline):
        _refuse(settings, _CLASSES, "is told texts: give --prompts or --prompts_file instead")
        _from_prompts(settings, student, out, singly, device)
    else:
        _refuse(settings, _TEXT, "is not told texts: give --labels, or nothing if it has no classes")
        _from_classes(settings, out, singly, device)


def _refuse(settings: GenerateConfig, names: tuple[str, ...], why: str) -> None:
    """Refuses settings that another kind of pipeline has."""
    default = GenerateConfig()
    given = [name for name in names if getattr(settings, name) != getattr(default, name)]
    if given:
        raise InputError(f"--{given[0]} is not for {settings.pipeline!r}, which {why}.")


def _read_prompts(settings: GenerateConfig) -> list[str]:
    if bool(settings.prompts) == bool(settings.prompts_file):
        raise InputError("Give --prompts TEXT …, or --prompts_file FILE with a prompt on each line.")
    from ..data.config import DataConfig
    from ..evaluation.prompts import load_prompts
    from ..text_to_image.texts import check_prompts

    if settings.prompts_file:
        return load_prompts(settings.prompts_file, DataConfig(), 1, None).texts
    check_prompts(settings.prompts)
    return settings.prompts


def _from_prompts(settings: GenerateConfig, student: bool, out: Path, singly: bool, device: str) -> None:
    prompts = _read_prompts(settings)

    import torch

    from ..text_to_image.stock_calls import prompt_rows, teacher_images
    from ..text_to_image.student import load_student
    from ..text_to_image.teacher import load_stock_pipeline
    from ..visualization import image_grid

    dtype, steps = getattr(torch, settings.dtype), settings.num_inference_steps
    evaluations, size = "", (settings.height, settings.width)
    if student:
        _refuse(settings, ("guidance_scale",), "is a student, and needs no guidance: leave it out")
        loaded = load_student(settings.pipeline, dtype, settings.base, settings.revision)
        steps = loaded.arguments(steps)["num_inference_steps"]
        evaluations = f", {'one network evaluation' if steps == 1 else f'{steps} network evaluations'} each"
        if settings.lora:
            loaded.add_lora(settings.lora, "second", settings.lora_scale)
        pipeline = loaded.pipeline

        def draw(texts: list[str], generators: list[torch.Generator]) -> list[typing.Any]:
            return loaded.images(texts, steps, generators, *size)

    else:
        _refuse(settings, ("base", "lora", "lora_scale"), "is a stock pipeline and no student: leave it out")
        pipeline = load_stock_pipeline(settings.pipeline, dtype, settings.revision)

        def draw(texts: list[str], generators: list[torch.Generator]) -> list[typing.Any]:
            return teacher_images(pipeline, texts, steps, settings.guidance_scale, generators, *size)

    pipeline.to(device)
    rows = prompt_rows(draw, prompts, settings.num_images_per_prompt, settings.seed, settings.batch_size or 4)
    if singly:
        out.mkdir(parents=True, exist_ok=True)
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                _save(image, out / f"{column}_{_in_file_name(prompts[column])}_seed{settings.seed + row}.png")
    else:
        alone = len(rows) == len(prompts) == 1
        _save(rows[0][0] if alone else image_grid(rows, column_titles=prompts), out)
    count = len(rows) * len(prompts)
    print(f"Saved {count} image{'s' if count > 1 else ''}{evaluations}: {out}")


def _from_classes(settings: GenerateConfig, out: Path, singly: bool, device: str) -> None:
    import os

    import torch

    from ..loading import load_pipeline
    from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
    from ..sampling import class_names, open_images, sample_rows, spread_labels
    from ..visualization import image_grid

    if settings.teacher and (singly or settings.image):
        raise InputError(
            "`teacher` is for a picture of a student that starts from noise: leave out --image and give a file."
        )
    batch_size = settings.batch_size or 64
    where = {"revision": settings.revision} if settings.revision else {}
    trust = settings.trust_remote_code
    pipeline = load_pipeline(
        OneStepInterpolantPipeline, "student", settings.pipeline, trust, dtype=getattr(torch, settings.dtype), **where
    )
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher, trust) if settings.teacher else None
    if teacher and teacher.network.sample_shape != pipeline.network.sample_shape:
        raise InputError(f"The teacher {settings.teacher!r} makes images of another size than the student.")
    inputs = open_images(settings.image, pipeline.image_channels) if settings.image else None
    if inputs is None and pipeline.image_channels:
        raise InputError(f"The student {settings.pipeline!r} turns images into others: give --image FILE …")
    labels = None  # an unconditional network
    if pipeline.network.num_classes or settings.labels:
        if inputs and len(settings.labels) not in (1, len(inputs)):
            raise InputError(
                f"There are {len(inputs)} images and {len(settings.labels)} labels: give --labels one for each image, or "
                "one for all."
            )
        names = settings.labels or spread_labels(pipeline.network.num_classes)
        names = names * len(inputs) if inputs and len(names) == 1 else names
        try:
            labels = pipeline.get_label_ids([int(name) if str(name).isdecimal() else name for name in names])
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from error
    pipeline.to(device)
    try:
        steps = {} if settings.num_inference_steps is None else {"num_inference_steps": settings.num_inference_steps}
        rows = sample_rows(
            pipeline, labels, settings.images_per_label, settings.seed, batch_size, images=inputs, **steps
        )
        if teacher:
            teacher.to(device).set_progress_bar_config(disable=True)
            again = {"num_inference_steps": settings.teacher_steps}
            taught = sample_rows(
                teacher, labels, settings.images_per_label, settings.seed, batch_size, images=None, **again
            )
    except ValueError as error:
        also = " The teacher's steps are --teacher_steps." if settings.teacher and settings.num_inference_steps else ""
        raise InputError(f"{error}{also}") from error

    titles = class_names(pipeline, labels) if labels else None
    count = sum(map(len, rows))
    if singly:
        out.mkdir(parents=True, exist_ok=True)
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                parts = [f"{labels[column]}_{_in_file_name(titles[column])}"] if labels and titles else []
                parts += [f"{column}_{Path(settings.image[column]).stem}"] if inputs else []
                name = os.fsdecode(os.fsencode("_".join(parts))[:200])  # most systems allow 255 bytes
                _save(image, out / f"{name}{'_' if parts else ''}seed{settings.seed + row}.png")
    elif inputs:
        size = rows[0][0].size
        shown = [[image.resize(size, 0) for image in inputs], *rows]  # 0: each pixel as a square
        names = ["input", *(f"seed {settings.seed + row}" for row in range(len(rows)))]
        _save(image_grid(shown, names, titles or [Path(file).stem for file in settings.image]), out)
    elif teacher:
        names = [*["student"] * len(rows), *[f"teacher, {settings.teacher_steps} steps"] * len(taught)]
        _save(image_grid([*rows, *taught], names, titles), out)
    else:
        _save(image_grid(rows, column_titles=titles), out)
    calls = pipeline.num_network_evaluations // pipeline.trained_steps[-1]
    calls *= settings.num_inference_steps or pipeline.trained_steps[-1]
    evaluations = "one network evaluation" if calls == 1 else f"{calls} network evaluations"
    print(f"Saved {count} image{'s' if count > 1 else ''}, {evaluations} each: {out}")


def _in_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)[:60]


def _save(picture: typing.Any, path: Path) -> None:
    from PIL import Image

    from ..files import whole_file

    with whole_file(path) as file:
        picture.save(file, Image.registered_extensions()[path.suffix.lower()])


if __name__ == "__main__":
    script_main(main)
