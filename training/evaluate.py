#!/usr/bin/env python
r"""Compares students, teachers or finished images with real ones; prints a table and writes it, JSON and pictures.

    accelerate launch training/evaluate.py --pipeline runs/digits-student --teacher runs/digits-teacher
    accelerate launch training/evaluate.py --pipeline runs/cifar10-student --config configs/cifar10/evaluation.yaml \
        --features inception-v3-compat --reference cifar10-32x32.npz --num_samples 50000
    accelerate launch training/evaluate.py --images samples.npz --data.name parquet --data.data_files 'train-*.parquet'

It goes on where it was killed, with any number of processes and any batch size. All settings:
`python training/evaluate.py --help`; docs/evaluation.md says what they mean.
"""

from si_distill.settings import script_main


def main(argv: list[str]) -> None:
    from si_distill.data.of_run import with_data_of_run
    from si_distill.evaluation.config import EVALUATION, EvaluationConfig

    settings = with_data_of_run(EvaluationConfig, argv, __doc__, "pipeline", "teacher")

    from si_distill.evaluation.report import evaluate, output_path
    from si_distill.evaluation.table import format_table
    from si_distill.hub.card import write_card

    result = evaluate(settings)
    if result is not None:
        print("\n" + format_table(result))
        folder = output_path(settings).parent
        if output_path(settings).name == EVALUATION and (folder / "model_index.json").exists():
            write_card(folder)


if __name__ == "__main__":
    script_main(main)
