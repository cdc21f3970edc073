#!/usr/bin/env python
"""Trains a multi-step teacher and leaves it as an InterpolantPipeline folder.

    accelerate launch training/train_teacher.py --config configs/digits/teacher.yaml
    accelerate launch training/train_teacher.py --config configs/digits/teacher.yaml --max_steps 100 --output_dir runs/try

All settings: `python training/train_teacher.py --help`.
"""

from si_distill.settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from si_distill.training.config import TeacherConfig

    settings = parse_settings(TeacherConfig, argv, __doc__)

    if settings.dry_run:
        from si_distill.training.dry_run.report import print_dry_run

        return print_dry_run(settings)

    from si_distill.training.teacher import TeacherTrainer

    TeacherTrainer(settings).train()


if __name__ == "__main__":
    script_main(main)
