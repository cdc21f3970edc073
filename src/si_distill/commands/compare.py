r"""Compares objectives, or any settings of a distillation, over seeds: one command, a table and a figure.

    si-distill compare --base configs/digits/distill.yaml --teacher runs/digits-teacher --runs my_runs.yaml \
        --steps 1500 --seeds 0 1 2 --workers 2 --output runs/comparison
    si-distill compare --base configs/cifar10/distill.yaml --teacher runs/cifar10-teacher --runs my_runs.yaml \
        --features inception-v3-compat --metrics fid kid prc --num_samples 10000 --output runs/cifar10-comparison

my_runs.yaml gives each run a name and what differs from the base, in the words of `si-distill train-distill`:

    sid: {}
    sid, 5 critic steps: {critic_steps: 5}
    realuid: {objective: realuid, objective_kwargs: {alpha: 0.92, beta: 0.94}}

Each finished run is written at once: the same command goes on after a stop. benchmarks/README.md has an example.
All settings: `si-distill compare --help`.
"""

from ..settings import given_imports, parse_settings, script_main


def main(argv: list[str]) -> None:
    from ..training.comparison.config import CompareConfig

    settings = parse_settings(CompareConfig, argv, __doc__)

    from ..training.comparison.run import compare

    print("\n" + compare(settings, given_imports(argv)))


if __name__ == "__main__":
    script_main(main)
