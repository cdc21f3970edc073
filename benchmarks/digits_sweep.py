#!/usr/bin/env python
"""Distils one digits teacher with many objectives on the same budget of student updates: a table and a figure.

    python benchmarks/digits_sweep.py --teacher runs/digits-teacher --workers 2
    python benchmarks/digits_sweep.py --only "sid(1.0)" gap --seeds 0 --steps 200 --output runs/sweep --figures runs/sweep

It is `training/compare.py` with the runs of digits_sweep.yaml, each evaluated as by `training/evaluate.py`: 1,797 samples
with the labels of the real digits, noise of seed 0. All settings: `python benchmarks/digits_sweep.py --help`.
"""

from dataclasses import dataclass

from si_distill.settings import given_imports, parse_settings, script_main, setting
from si_distill.training.comparison.config import CompareConfig


@dataclass
class SweepConfig(CompareConfig):
    """Settings of the sweep."""

    teacher: str = setting("runs/digits-teacher", "The teacher's folder.")
    runs: str = setting("benchmarks/digits_sweep.yaml", "YAML file: name → settings of the run.")
    base: str = setting("benchmarks/digits_base.yaml", "Settings that all runs share.")
    num_samples: int = setting(1797, "Images per evaluation.")
    workers: int = setting(2, "Processes of one thread.")
    output: str = setting("benchmarks/results", "Folder of digits_sweep.json and digits_sweep.md.")
    figures: str = setting("docs/images", "Folder of the figure.")
    name: str = setting("digits_sweep", "Beginning of the names of these files.")


def main(argv: list[str]) -> None:
    config = parse_settings(SweepConfig, argv, __doc__)

    from si_distill.training.comparison.run import compare

    print("\n" + compare(config, given_imports(argv)))


if __name__ == "__main__":
    script_main(main)
