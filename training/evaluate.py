#!/usr/bin/env python
"""Compares a student, its teacher and real images; prints a table and writes evaluation.json and a picture beside it.

    accelerate launch training/evaluate.py --pipeline runs/digits-student --teacher runs/digits-teacher
    accelerate launch training/evaluate.py --pipeline runs/digits-student --teacher runs/digits-teacher \
        --teacher_steps 1 10 50 --seed 1 --output runs/digits-student/evaluation-seed1.json

All settings: `python training/evaluate.py --help`.
"""

from si_distill.settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from si_distill.evaluation.config import EvaluationConfig

    settings = parse_settings(EvaluationConfig, argv, __doc__)

    from si_distill.evaluation.report import evaluate, format_table

    result = evaluate(settings)
    print("\n" + format_table(result))


if __name__ == "__main__":
    script_main(main)
