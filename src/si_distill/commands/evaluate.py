r"""Compares students, teachers or finished images with real ones; prints a table and writes it, JSON and pictures.

    si-distill evaluate --pipeline runs/digits-student --teacher runs/digits-teacher
    si-distill evaluate --pipeline runs/cifar10-student --features inception-v3-compat \
        --reference cifar10-32x32.npz --num_samples 50000
    si-distill evaluate --images samples.npz --data.name parquet --data.data_files 'train-*.parquet'
    si-distill evaluate --pipeline runs/sd35-turbo --teacher stabilityai/stable-diffusion-3.5-medium --teacher_steps 4 28 \
        --prompts_file prompts.txt --images_per_prompt 2 --metrics clip_score diversity --dtype bfloat16

It goes on where it was killed, with any batch size and any number of processes: `accelerate launch -m
si_distill.commands.evaluate`, or training/evaluate.py of a clone. docs/evaluation.md says what the settings mean.
"""

from ..settings import given_settings, script_main


def main(argv: list[str]) -> None:
    from ..data.of_run import with_data_of_run
    from ..evaluation.config import EVALUATION, EvaluationConfig

    # Prompts of a file have no images.
    runs = () if given_settings(EvaluationConfig, argv, __doc__).get("prompts_file") else ("pipeline", "teacher")
    settings = with_data_of_run(EvaluationConfig, argv, __doc__, *runs)

    from ..evaluation.prepared import output_path
    from ..evaluation.report import evaluate
    from ..evaluation.table import format_table
    from ..hub.card import write_card

    result = evaluate(settings)
    if result is not None:
        print("\n" + format_table(result))
        folder = output_path(settings).parent
        is_ours = (folder / "model_index.json").exists() and not settings.has_prompts
        if output_path(settings).name == EVALUATION and is_ours:
            write_card(folder)


if __name__ == "__main__":
    script_main(main)
