#!/usr/bin/env python
r"""Encodes a data set once with a VAE; the folder is then a data set for teachers and students on latents.

    accelerate launch training/precompute_latents.py --config configs/imagenet256/latents.yaml
    accelerate launch training/train_distill.py --config configs/imagenet256/distill.yaml \
        --config configs/recipes/sida.yaml --output_dir runs/imagenet256-sit-xl-2-sida

It goes on where it was killed, with any number of processes. All settings: `python training/precompute_latents.py --help`.
"""

from si_distill.settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from si_distill.data.latents.config import LatentsConfig

    settings = parse_settings(LatentsConfig, argv, __doc__)

    from si_distill.data.latents.encoding import precompute_latents, print_dry_run

    print_dry_run(settings) if settings.dry_run else precompute_latents(settings)


if __name__ == "__main__":
    script_main(main)
