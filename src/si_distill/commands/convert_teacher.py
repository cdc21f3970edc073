r"""Turns a published checkpoint into a pipeline folder that trains, samples, distils and evaluates like our own.

    si-distill convert-teacher --source SiT-XL-2-256.pt --out runs/sit-xl-2 \
        --vae stabilityai/sd-vae-ft-ema --id2label imagenet
    si-distill convert-teacher --source cifar10_uncond_FM_380000.pt --ema_decay 0.9999 --out runs/cifar10-teacher

The kind is recognised from the content. docs/teachers.md says what each kind is and where it comes from.
"""

from ..settings import parse_settings, script_main


def main(argv: list[str]) -> None:
    from ..conversion.config import ConvertConfig

    settings = parse_settings(ConvertConfig, argv, __doc__)

    from ..conversion.convert import convert_checkpoint

    convert_checkpoint(settings)


if __name__ == "__main__":
    script_main(main)
