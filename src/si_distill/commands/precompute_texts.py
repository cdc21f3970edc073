r"""Encodes prompts once with a text-to-image pipeline; the folder is then a data set, and training needs no text encoders.

    si-distill precompute-texts --teacher stabilityai/stable-diffusion-3.5-medium \
        --data.name text --data.data_files prompts.txt --texts_dir runs/prompts-sd35
    si-distill train-distill --teacher stabilityai/stable-diffusion-3.5-medium --data.name runs/prompts-sd35

A config of train-distill is taken too: what it says of the teacher, the data and the texts is used, and the rest is not.

It goes on where it was killed, with any number of processes:
`accelerate launch -m si_distill.commands.precompute_texts`, or
training/precompute_texts.py of a clone.
"""

from typing import Any

from ..settings import given_settings, script_main, settings_from_dict


def main(argv: list[str]) -> None:
    import dataclasses

    from ..text_to_image.config import PrecomputeTextsConfig
    from ..training.distillation.config import DistillConfig

    values: dict[str, Any] = given_settings(PrecomputeTextsConfig, argv, __doc__)
    own, theirs = ({field.name for field in dataclasses.fields(cls)} for cls in (PrecomputeTextsConfig, DistillConfig))
    values = {name: value for name, value in values.items() if name in own or name not in theirs}
    settings = settings_from_dict(PrecomputeTextsConfig, values)

    from ..text_to_image.text_encoding import precompute_texts

    precompute_texts(settings)


if __name__ == "__main__":
    script_main(main)
