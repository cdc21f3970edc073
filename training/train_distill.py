#!/usr/bin/env python
r"""Distils a teacher into a one-step student and leaves it as a OneStepInterpolantPipeline folder.

    accelerate launch training/train_distill.py --config configs/digits/distill.yaml --teacher runs/digits-teacher
    accelerate launch training/train_distill.py --config configs/digits/distill.yaml --teacher runs/digits-teacher \
        --objective realuid --objective_kwargs '{alpha: 0.92, beta: 0.94}' --output_dir runs/digits-realuid

All settings: `python training/train_distill.py --help`.
"""

from si_distill.settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from si_distill.training.distillation.config import DistillConfig

    settings = parse_settings(DistillConfig, argv, __doc__)

    if settings.dry_run:
        from si_distill.training.dry_run.report import print_dry_run

        return print_dry_run(settings)

    from si_distill.training.distillation.trainer import DistillationTrainer

    DistillationTrainer(settings).train()


if __name__ == "__main__":
    script_main(main)
