"""Generates images with a student of one or a few steps: one picture that names its classes, or a file for each image.

    si-distill generate --pipeline runs/digits-student --labels 3 7 --out grid.png
    si-distill generate --pipeline runs/digits-student --labels 3 7 --images_per_label 8 --seed 1 --out images/
    si-distill generate --pipeline user/student --revision 0123abc --labels goldfish --dtype bfloat16 --out fish.png
    si-distill generate --pipeline runs/digits-student --teacher runs/digits-teacher --out both.png
    si-distill generate --pipeline runs/digits-superres-student --image small/*.png --out large.png

A class is a number or a name; quote names that hold spaces. A student that turns images into others takes --image, files of
one size; with classes, one of --labels for each, or one for all. An --out that ends with / (or is a folder) takes single
files.
"""

from dataclasses import dataclass

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
    batch_size: int = setting(64, "Images generated at once.")
    dtype: str = setting("float32", "Precision of the network.", ("float32", "bfloat16", "float16"))
    device: str | None = setting(None, "`cuda`, `cuda:1`, `cpu`, …; a GPU when there is one.")
    out: str = setting("grid.png", "The picture's file, or the folder of single files.")


def main(argv: list[str]) -> None:
    settings = parse_settings(GenerateConfig, argv, __doc__)

    import os
    import re
    from pathlib import Path

    import torch
    from PIL import Image

    from ..errors import InputError
    from ..files import whole_file
    from ..loading import load_pipeline
    from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
    from ..sampling import class_names, open_images, sample_rows, spread_labels
    from ..settings import LARGEST_SEED, MOST_SAMPLES, at_least
    from ..visualization import image_grid

    for name in ("images_per_label", "batch_size", "teacher_steps"):
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
    if settings.teacher and (singly or settings.image):
        raise InputError(
            "`teacher` is for a picture of a student that starts from noise: leave out --image and give a file."
        )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # which `meta` has not
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`device` {device!r} cannot be used: {str(error).splitlines()[0]}") from None

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
            pipeline, labels, settings.images_per_label, settings.seed, settings.batch_size, images=inputs, **steps
        )
        if teacher:
            teacher.to(device).set_progress_bar_config(disable=True)
            again = {"num_inference_steps": settings.teacher_steps}
            taught = sample_rows(
                teacher, labels, settings.images_per_label, settings.seed, settings.batch_size, images=None, **again
            )
    except ValueError as error:
        also = " The teacher's steps are --teacher_steps." if settings.teacher and settings.num_inference_steps else ""
        raise InputError(f"{error}{also}") from error

    def save(picture: Image.Image, path: Path) -> None:
        with whole_file(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])

    titles = class_names(pipeline, labels) if labels else None
    count = sum(map(len, rows))
    if singly:
        out.mkdir(parents=True, exist_ok=True)
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                parts = (
                    [f"{labels[column]}_{re.sub(r'[^A-Za-z0-9-]+', '-', titles[column])[:60]}"]
                    if labels and titles
                    else []
                )
                parts += [f"{column}_{Path(settings.image[column]).stem}"] if inputs else []
                name = os.fsdecode(os.fsencode("_".join(parts))[:200])  # most systems allow 255 bytes
                save(image, out / f"{name}{'_' if parts else ''}seed{settings.seed + row}.png")
    elif inputs:
        size = rows[0][0].size
        shown = [[image.resize(size, 0) for image in inputs], *rows]  # 0: each pixel as a square
        names = ["input", *(f"seed {settings.seed + row}" for row in range(len(rows)))]
        save(image_grid(shown, names, titles or [Path(file).stem for file in settings.image]), out)
    elif teacher:
        names = [*["student"] * len(rows), *[f"teacher, {settings.teacher_steps} steps"] * len(taught)]
        save(image_grid([*rows, *taught], names, titles), out)
    else:
        save(image_grid(rows, column_titles=titles), out)
    calls = pipeline.num_network_evaluations // pipeline.trained_steps[-1]
    calls *= settings.num_inference_steps or pipeline.trained_steps[-1]
    evaluations = "one network evaluation" if calls == 1 else f"{calls} network evaluations"
    print(f"Saved {count} image{'s' if count > 1 else ''}, {evaluations} each: {out}")


if __name__ == "__main__":
    script_main(main)
