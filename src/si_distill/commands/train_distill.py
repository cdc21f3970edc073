r"""Distils a teacher into a one-step student and leaves it as a OneStepInterpolantPipeline folder.

    si-distill train-distill --config digits/distill --teacher runs/digits-teacher
    si-distill train-distill --config digits/distill --teacher runs/digits-teacher \
        --objective realuid --objective_kwargs '{alpha: 0.92, beta: 0.94}' --output_dir runs/digits-realuid

On several processes: `accelerate launch -m si_distill.commands.train_distill`, or training/train_distill.py of a clone.
"""

from ..settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from ..training.distillation.config import DistillConfig

    settings = parse_settings(DistillConfig, argv, __doc__)

    if settings.dry_run:
        from ..training.dry_run.report import print_dry_run

        return print_dry_run(settings)

    from ..text_to_image.teacher import is_text_to_image

    if is_text_to_image(settings.teacher, "teacher"):
        from ..training.distillation.text_trainer import TextDistillationTrainer

        return TextDistillationTrainer(settings).train()

    from ..training.distillation.trainer import DistillationTrainer

    DistillationTrainer(settings).train()


if __name__ == "__main__":
    script_main(main)
