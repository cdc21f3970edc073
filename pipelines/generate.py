#!/usr/bin/env python
"""Generates images with a one-step student and saves them as one picture.

python pipelines/generate.py --pipeline runs/digits-student --labels 3 7 --out grid.png
python pipelines/generate.py --pipeline runs/digits-student --labels 3 7 --images_per_label 8 --seed 1 --out grid.png
"""

from dataclasses import dataclass

from si_distill.settings import parse_settings, script_main, setting


@dataclass
class GenerateConfig:
    pipeline: str = setting("", "The student: a pipeline folder or a Hub id.")
    labels: list[str] = setting([], "Classes by number or name; all when not given (at most 10).")
    images_per_label: int = setting(8, "Images of each class, or of an unconditional student.")
    seed: int = setting(0, "Row n of every class is drawn from seed + n.")
    out: str = setting("grid.png", "The picture's file.")


def main(argv: list[str]) -> None:
    settings = parse_settings(GenerateConfig, argv, __doc__)

    from pathlib import Path

    import torch

    from si_distill import OneStepInterpolantPipeline
    from si_distill.errors import InputError
    from si_distill.settings import at_least
    from si_distill.visualization import image_grid

    at_least("images_per_label", settings.images_per_label, 1)
    out = Path(settings.out)
    if not settings.pipeline or not out.parent.is_dir():
        raise InputError("Give --pipeline FOLDER_OR_REPO and an --out file in a folder that exists.")
    try:
        pipeline = OneStepInterpolantPipeline.from_pretrained(settings.pipeline)
        labels = None  # an unconditional network
        if pipeline.network.num_classes or settings.labels:
            names = settings.labels or list(range(min(pipeline.network.num_classes, 10)))
            labels = pipeline.get_label_ids([int(name) if str(name).isdecimal() else name for name in names])
    except (OSError, ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in range(settings.images_per_label):
        generators = [torch.Generator().manual_seed(settings.seed + row) for _ in labels or [None]]
        rows.append(pipeline(labels, generator=generators).images)
    names = pipeline.config.id2label or {}
    titles = labels and [str(names.get(label, label)).split(",")[0] for label in labels]
    image_grid(rows, column_titles=titles).save(out)
    print(f"Saved {sum(map(len, rows))} images, one network evaluation each: {out}")


if __name__ == "__main__":
    script_main(main)
