r"""Bits per dimension of real images under a teacher, by the probability-flow ODE; prints the result and writes it as JSON.

    si-distill likelihood --teacher runs/digits-teacher
    si-distill likelihood --teacher runs/cifar10-teacher --data.name parquet --data.data_files 'test-*.parquet' \
        --num_samples 1000 --output runs/cifar10-teacher/likelihood-test.json

docs/sampling.md says what is measured.
"""

from ..settings import script_main


def main(argv: list[str]) -> None:
    from ..data.of_run import with_data_of_run
    from ..evaluation.config import LikelihoodConfig

    settings = with_data_of_run(LikelihoodConfig, argv, __doc__, "teacher")

    from ..evaluation.likelihood_report import measure_likelihood

    result = measure_likelihood(settings)
    print(
        f"{result['bits per dimension']:.4f} ± {result['standard error']:.4f} bits per dimension, "
        f"{result['network evaluations']:.0f} network evaluations for each of {result['images']} images of "
        f"{result['data']['name']} (written to {result['output']})"
    )


if __name__ == "__main__":
    script_main(main)
