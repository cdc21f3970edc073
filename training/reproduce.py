#!/usr/bin/env python
"""Takes a published recipe from its teacher's checkpoint to a table next to the published figures.

    python training/reproduce.py cifar10/distill_sid --checkpoint edm-cifar10-32x32-uncond-vp.pkl \
        --accelerate_config configs/accelerate/ddp.yaml --num_processes 4 --reference cifar10-32x32.npz

It converts the teacher, measures it, distils it with measurements on the way, and measures the student. What is finished is
not done again: the same command goes on after a kill. A teacher that misses its published figure, and a run that is off
track, end it. docs/reproduce.md says more; all settings: `python training/reproduce.py --help`.
"""

from si_distill.settings import script_main


def main(argv: list[str]) -> None:
    from pathlib import Path

    from si_distill.settings import parse_settings
    from si_distill.training.reproduction.config import ReproduceConfig

    words = [] if not argv or argv[0].startswith("-") else ["--recipe", argv[0]]
    settings = parse_settings(ReproduceConfig, [*words, *argv[len(words) // 2 :]], __doc__)

    from si_distill.training.reproduction.steps import Reproduction

    Reproduction(settings, Path(__file__).resolve().parent.parent).run()


if __name__ == "__main__":
    script_main(main)
