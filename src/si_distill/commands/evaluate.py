r"""Compares students, teachers or finished images with real ones; prints a table and writes it, JSON and pictures.

    si-distill evaluate --pipeline runs/digits-student --teacher runs/digits-teacher
    si-distill evaluate --pipeline runs/cifar10-student --features inception-v3-compat \
        --reference cifar10-32x32.npz --num_samples 50000
    si-distill evaluate --images samples.npz --data.name parquet --data.data_files 'train-*.parquet'

It goes on where it was killed, with any batch size and any number of processes: `accelerate launch -m
si_distill.commands.evaluate`, or training/evaluate.py of a clone. docs/evaluation.md says what the settings mean.
"""

from ..settings import script_main


def main(argv: list[str]) -> None:
    from ..data.of_run import with_data_of_run
    from ..evaluation.config import EVALUATION, EvaluationConfig

    settings = with_data_of_run(EvaluationConfig, argv, __doc__, "pipeline", "teacher")

    from ..evaluation.report import evaluate, output_path
    from ..evaluation.table import format_table
    from ..hub.card import write_card

    result = evaluate(settings)
    if result is not None:
        print("\n" + format_table(result))
        folder = output_path(settings).parent
        if output_path(settings).name == EVALUATION and (folder / "model_index.json").exists():
            write_card(folder)


if __name__ == "__main__":
    script_main(main)
