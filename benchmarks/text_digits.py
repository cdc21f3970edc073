#!/usr/bin/env python
"""What pictures of captioned digits show: teachers and students of `make demo-text`, judged by classifiers of real images.

    python benchmarks/text_digits.py --pipelines runs/text-digits/teacher --output runs/text-digits/figures

Each of the 160 captions is drawn `--images_per_caption` times. Digit, colour and place are what the judge sees; the Fréchet
distance is between its features of generated and of real images, of as many of each; diversity is the root mean square
distance of two images of one caption, in pixels of [-1, 1]. The row of real images says what another draw of data gets.
"""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text

from si_distill.errors import InputError
from si_distill.settings import at_least, parse_settings, script_main, setting

FIGURES = {"digit": 1, "colour": 1, "place": 1, "all": 1, "Fréchet distance": 2, "diversity": 3}
#: The file by which a folder is known as a student.
STUDENT = "student.json"
#: Images that are drawn at a time, and tokens that a caption has at most.
BATCH, LONGEST = 160, 16


@dataclass
class TextDigitsConfig:
    """Settings of the comparison."""

    pipelines: list[str] = setting([], "Folders of text-to-image pipelines, and of their students.")
    steps: list[int] = setting([1, 4, 20], "Steps of pipelines that are no students; students take their own.")
    guidance: list[float] = setting([1.0, 3.0], "Guidance scales of these.")
    images_per_caption: int = setting(4, "Images of each caption.")
    seed: int = setting(0, "Seed of the noise.")
    judge: str = setting("runs/text-digits/judge.safetensors", "The judge; trained when there is no such file.")
    output: str = setting("runs/text-digits/figures", "Folder of text_digits.json, text_digits.md and text_digits.png.")

    def __post_init__(self) -> None:
        at_least("images_per_caption", self.images_per_caption, 2)
        if not self.pipelines:
            raise InputError("`pipelines` is empty: give the folders to compare, e.g. --pipelines runs/a runs/b.")
        for folder in self.pipelines:
            if not any(Path(folder, name).is_file() for name in ("model_index.json", STUDENT)):
                raise InputError(f"{folder} is no pipeline: it has neither model_index.json nor {STUDENT}.")


def draw_rows(folder: str, config: TextDigitsConfig, scenes: list) -> dict[str, Any]:
    """Images (N, 3, 16, 16) in [-1, 1] of the scenes from each way of sampling a folder's pipeline, by its name."""
    import torch

    captions = [scene.caption for scene in scenes]
    generators = [torch.Generator().manual_seed(config.seed * len(scenes) + n) for n in range(len(scenes))]
    states = [generator.get_state() for generator in generators]
    ways = _student_ways(folder) if Path(folder, STUDENT).exists() else _teacher_ways(folder, config)
    rows = {}
    for name, sample in ways.items():
        for generator, state in zip(generators, states, strict=True):  # the same noise for all
            generator.set_state(state)
        parts = [slice(start, start + BATCH) for start in range(0, len(captions), BATCH)]
        rows[name] = torch.cat([sample(captions[part], generators[part]) for part in parts]).clamp(-1, 1)
    return rows


def _teacher_ways(folder: str, config: TextDigitsConfig) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    from si_distill.pipelines import LatentScaling

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scaling = LatentScaling.of(pipeline.vae)

    def way(steps: int, guidance: float) -> Any:
        def sample(captions: list[str], generators: list) -> Any:
            told = dict(num_inference_steps=steps, guidance_scale=guidance, generator=generators)
            told["max_sequence_length"] = LONGEST  # the same picture in a third of the time: no padding to 256
            # The autoencoder only enlarges: what it would be given are the pixels.
            return scaling.decode(pipeline(captions, output_type="latent", **told).images)

        return sample

    return {
        f"{Path(folder).name}, {steps} step{'s' * (steps > 1)}, guidance {guidance:g}": way(steps, guidance)
        for steps in config.steps
        for guidance in config.guidance
    }


def _student_ways(folder: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from text_digits_data import shrink

    from si_distill.text_to_image.student import load_student

    student = load_student(folder)

    def way(steps: int) -> Any:
        def sample(captions: list[str], generators: list) -> Any:
            images = np.stack([np.asarray(image) for image in student.images(captions, steps, generators)])
            return shrink(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)

        return sample

    return {f"{Path(folder).name}, {steps} step{'s' * (steps > 1)}": way(steps) for steps in student.trained_steps}


def measure(judge: Any, images: Any, scenes: list, real: Any) -> dict[str, float]:
    """The figures of images (N, 3, 16, 16) of these scenes, those of one caption a fixed number of places apart.

    Args:
        judge: see `text_digits_judge`.
        images, scenes: what was drawn and what it should show, all captions once, then all again, and so on.
        real: as many real images.
    """
    import numpy as np

    from si_distill.evaluation.formulas import frechet_from_moments

    right = {name: 100 * seen.double().mean().item() for name, seen in judge.right(images, scenes).items()}
    moments = []
    for each in (images, real):
        features = judge.features(each).double().numpy()
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    of_caption = images.unflatten(0, (-1, len(set(scenes)))).flatten(2)
    pairs = [(a - b).square().mean(1).sqrt().mean().item() for a, b in combinations(of_caption, 2)]
    return {**right, "Fréchet distance": frechet_from_moments(*moments), "diversity": float(np.mean(pairs))}


def picture(rows: dict[str, Any], scenes: list) -> Any:
    """Ten captions, one of each digit, as every row draws them."""
    import numpy as np
    from PIL import Image
    from text_digits_data import COLOURS, DIGITS, PLACES, Scene, enlarge

    from si_distill.visualization import image_grid, to_uint8

    shown = [Scene(digit, digit % len(COLOURS), (digit // 2) % len(PLACES)) for digit in range(len(DIGITS))]
    places = [scenes.index(scene) for scene in shown]
    grid = [
        [Image.fromarray(image) for image in enlarge(np.asarray(to_uint8(images[places]).permute(0, 2, 3, 1)))]
        for images in rows.values()
    ]
    return image_grid(grid, list(rows), [scene.caption.removeprefix("a ") for scene in shown])


def main(argv: list[str]) -> None:
    config = parse_settings(TextDigitsConfig, argv, __doc__)
    import torch
    from text_digits_data import SCENES, paint
    from text_digits_judge import as_tensor, load_judge

    output, judge = Path(config.output), load_judge(Path(config.judge))
    scenes = SCENES * config.images_per_caption
    real = as_tensor(paint(scenes, seed=10_001))
    rows = {"real images": as_tensor(paint(scenes, seed=10_002))}
    for folder in config.pipelines:
        rows |= draw_rows(folder, config, scenes)
    figures = {name: measure(judge, images, scenes, real) for name, images in rows.items()}
    table = [[name, *(f"{row[key]:.{digits}f}" for key, digits in FIGURES.items())] for name, row in figures.items()]
    names = ["digit %", "colour %", "place %", "all three %", "Fréchet distance", "diversity"]
    facts = hardware(1, torch.get_num_threads())
    text = markdown_table([f"{len(scenes)} images each", *names], table)
    write_json(output / "text_digits.json", {"settings": vars(config), "figures": figures, "hardware": facts})
    write_text(output / "text_digits.md", f"{text}\n\n{hardware_line(facts)}\n")
    picture(rows, scenes).save(output / "text_digits.png")
    print(f"{text}\nIn {output}: text_digits.json, text_digits.md, text_digits.png")


if __name__ == "__main__":
    script_main(main)
