"""Trains a multi-step teacher and leaves it as an InterpolantPipeline folder; or, with --model.pipeline, a text-to-image
pipeline of diffusers on captioned images, which it leaves as such a pipeline.

    si-distill train-teacher --config digits/teacher
    si-distill train-teacher --config digits/teacher --max_steps 100 --output_dir runs/try

On several processes: `accelerate launch -m si_distill.commands.train_teacher`, or training/train_teacher.py of a clone.
"""

from ..settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from ..training.config import TeacherConfig

    settings = parse_settings(TeacherConfig, argv, __doc__)

    if settings.dry_run:
        from ..training.dry_run.report import print_dry_run

        return print_dry_run(settings)

    if settings.is_text_to_image:
        from ..training.text_teacher import TextTeacherTrainer

        return TextTeacherTrainer(settings).train()

    from ..training.teacher import TeacherTrainer

    TeacherTrainer(settings).train()


if __name__ == "__main__":
    script_main(main)
