"""`si-distill generate` with prompts: students, their stock pipelines, and what does not fit."""

import pytest
from exported_students import save_student
from helpers import tiny_sit
from PIL import Image
from tiny_pipelines import build

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.commands.generate import main
from si_distill.errors import InputError

FOX, BOATS = "a red fox in the snow", "two boats"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    save_student(root, "sana", "student")
    save_student(root, "sana", "style", seed=2)
    OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler()).save_pretrained(root / "classes")
    build("qwen").save_pretrained(root / "qwen")
    return root


def generate(folder, out, *arguments):
    main(["--pipeline", str(folder), "--out", str(out), *arguments])
    return out


def test_one_prompt_is_one_image_which_its_seed_decides(folders, tmp_path, capsys):
    fox = generate(folders / "student", tmp_path / "fox.png", "--prompts", FOX, "--num_inference_steps", "4")
    assert "Saved 1 image, 4 network evaluations each" in capsys.readouterr().out
    with Image.open(fox) as image:
        assert image.size == (32, 32)
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n{BOATS}\n")
    prompts = ("--prompts_file", str(tmp_path / "prompts.txt"))
    generate(folders / "student", f"{tmp_path}/all/", *prompts, "--num_images_per_prompt", "2", "--batch_size", "3")
    names = {f"{prompt}_seed{n}.png" for prompt in ("0_a-red-fox-in-the-snow", "1_two-boats") for n in (0, 1)}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    again, other = (Image.open(tmp_path / f"all/0_a-red-fox-in-the-snow_seed{seed}.png") for seed in (0, 1))
    pixels = [list(image.tobytes()) for image in (Image.open(fox), again, other)]
    assert max(abs(a - b) for a, b in zip(pixels[0], pixels[1], strict=True)) <= 1  # of 255: batches round differently
    assert max(abs(a - b) for a, b in zip(pixels[0], pixels[2], strict=True)) > 10


def test_prompts_are_titles_and_a_second_lora_changes_the_images(folders, tmp_path):
    shape = ("--height", "32", "--width", "64")
    first = generate(folders / "student", tmp_path / "a.png", "--prompts", FOX, BOATS, *shape)
    with Image.open(first) as grid:
        assert grid.size == (4 + 2 * (64 + 4), 24 + 32 + 4)
        assert grid.convert("L").crop((4, 4, 132, 22)).getextrema()[0] < 100  # the titles
    style = ("--lora", str(folders / "style"))
    stacked = generate(folders / "student", tmp_path / "b.png", "--prompts", FOX, BOATS, *shape, *style)
    off = generate(
        folders / "student", tmp_path / "c.png", "--prompts", FOX, BOATS, *shape, *style, "--lora_scale", "0"
    )
    pixels = [Image.open(path).tobytes() for path in (first, stacked, off)]
    assert pixels[0] == pixels[2] != pixels[1]


@pytest.mark.parametrize("name", ["sana", "qwen"])
def test_a_stock_pipeline_has_its_own_steps_and_guidance(folders, tmp_path, name):
    shape = ("--height", "32", "--width", "32", "--num_inference_steps", "2")
    plain, guided = (
        generate(folders / name, tmp_path / f"{scale}.png", "--prompts", FOX, *shape, "--guidance_scale", scale)
        for scale in ("1.0", "4.0")
    )
    assert Image.open(plain).tobytes() != Image.open(guided).tobytes()


@pytest.mark.parametrize(
    ("folder", "arguments", "said"),
    [
        ("classes", ["--prompts", FOX], r"--prompts is not for .*classes', which is not told texts: give --labels"),
        ("student", ["--labels", "3"], r"--labels is not for .*student', which is told texts: give --prompts"),
        ("student", [], "Give --prompts TEXT"),
        ("student", ["--prompts", FOX, "--prompts_file", "x"], "Give --prompts TEXT"),
        ("student", ["--prompts", " "], "Prompt 1 of 1 is empty"),
        ("student", ["--prompts_file", "nowhere.txt"], "`prompts_file` nowhere.txt is not a file"),
        ("student", ["--prompts", FOX, "--guidance_scale", "3"], "is a student, and needs no guidance"),
        ("student", ["--prompts", FOX, "--num_inference_steps", "3"], "this student has 1, 4 steps"),
        ("student", ["--prompts", FOX, "--height", "33"], "multiples of"),
        ("student", ["--prompts", FOX, "--lora", "/nowhere"], "Cannot load the adapter '/nowhere'"),
        (
            "student",
            ["--prompts", FOX, "--base", "/nowhere"],
            "an adapter of the SanaPipeline '/nowhere', which cannot",
        ),
        ("sana", ["--prompts", FOX, "--lora", "x"], "is a stock pipeline and no student"),
        ("sana", ["--prompts", FOX, "--height", "33"], "The SanaPipeline refuses this"),
        ("nowhere", ["--prompts", FOX], "there is no such folder"),
    ],
)
def test_what_does_not_fit(folders, tmp_path, folder, arguments, said):
    with pytest.raises(InputError, match=said):
        generate(folders / folder, tmp_path / "grid.png", *arguments)
    assert not list(tmp_path.iterdir())
