r"""Takes a published recipe from its teacher's checkpoint to a table next to the published figures.

    si-distill reproduce cifar10/distill_sid --checkpoint edm-cifar10-32x32-uncond-vp.pkl \
        --accelerate_config configs/accelerate/ddp.yaml --num_processes 4 --reference cifar10-32x32.npz

It converts the teacher, measures it, distils it with measurements on the way, and measures the student. What is finished is
not done again: the same command goes on after a kill. A teacher that misses its published figure, and a run that is off
track, end it. docs/reproduce.md says more; all settings: `si-distill reproduce --help`.
"""

from ..settings import script_main


def main(argv: list[str]) -> None:
    from ..settings import parse_settings
    from ..training.reproduction.config import ReproduceConfig

    words = [] if not argv or argv[0].startswith("-") else ["--recipe", argv[0]]
    settings = parse_settings(ReproduceConfig, [*words, *argv[len(words) // 2 :]], __doc__)

    from ..training.reproduction.steps import Reproduction

    Reproduction(settings).run()


if __name__ == "__main__":
    script_main(main)
