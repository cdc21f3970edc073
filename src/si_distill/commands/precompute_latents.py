r"""Encodes a data set once with a VAE; the folder is then a data set for teachers and students on latents.

    si-distill precompute-latents --config imagenet256/latents
    si-distill train-distill --config imagenet256/distill --config recipes/sida \
        --output_dir runs/imagenet256-sit-xl-2-sida

It goes on where it was killed, with any number of processes:
`accelerate launch -m si_distill.commands.precompute_latents`, or
training/precompute_latents.py of a clone.
"""

from ..settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from ..data.latents.config import LatentsConfig

    settings = parse_settings(LatentsConfig, argv, __doc__)

    from ..data.latents.encoding import precompute_latents, print_dry_run

    print_dry_run(settings) if settings.dry_run else precompute_latents(settings)


if __name__ == "__main__":
    script_main(main)
