"""`pipelines/generate.py`: labels, seeds, batches and places of its images, and what it refuses."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_sit
from PIL import Image, ImageChops

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError

SCRIPT = Path(__file__).parent.parent.parent / "pipelines" / "generate.py"
generate = runpy.run_path(str(SCRIPT))["main"]
NAMES = {0: "goldfish, Carassius auratus", 1: "tench", 2: "great white shark"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler(), id2label=NAMES).save_pretrained(folder)
    return folder


def call(student, out, *arguments):
    generate(["--pipeline", str(student), "--out", str(out), *arguments])


def largest_difference(one, two) -> int:
    return max(high for _, high in [ImageChops.difference(Image.open(one), Image.open(two)).getextrema()])


def test_single_files_are_named_by_class_and_seed_and_do_not_depend_on_the_batch(student, tmp_path, capsys):
    call(
        student,
        f"{tmp_path}/a/",
        "--labels",
        "tench",
        "0",
        "great white shark",
        "--images_per_label",
        "2",
        "--seed",
        "5",
    )
    assert "Saved 6 images, one network evaluation each" in capsys.readouterr().out
    names = {f"{label}_seed{seed}.png" for label in ("1_tench", "0_goldfish", "2_great-white-shark") for seed in (5, 6)}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    call(student, f"{tmp_path}/b/", "--labels", "1", "--images_per_label", "1", "--seed", "6", "--batch_size", "1")
    assert largest_difference(tmp_path / "a" / "1_tench_seed6.png", tmp_path / "b" / "1_tench_seed6.png") <= 1
    assert largest_difference(tmp_path / "a" / "1_tench_seed5.png", tmp_path / "a" / "1_tench_seed6.png") > 1


def test_the_grid_has_a_titled_column_for_each_class(student, tmp_path):
    call(student, tmp_path / "grid.png", "--images_per_label", "2", "--dtype", "bfloat16", "--device", "cpu")
    grid = Image.open(tmp_path / "grid.png").convert("L")
    assert grid.width > 3 * 48  # three columns of enlarged images
    titles = grid.crop((0, 0, grid.width, 20))
    assert all(
        titles.crop((n * grid.width // 3, 0, (n + 1) * grid.width // 3, 20)).getextrema()[0] < 128 for n in range(3)
    )


def test_pictures_are_whole_and_go_through_no_link(student, tmp_path, monkeypatch):
    (tmp_path / "thesis.png").write_text("years of work")
    (tmp_path / "images").mkdir()
    for link in ("grid.png", "images/1_tench_seed0.png"):
        (tmp_path / link).symlink_to(tmp_path / "thesis.png")
    for out in ("grid.png", "grid.webp", "grid.JPG", "images"):
        call(student, tmp_path / out, "--labels", "tench", "--images_per_label", "1")
    assert (tmp_path / "thesis.png").read_text() == "years of work"
    assert [Image.open(tmp_path / f"grid.{suffix}").format for suffix in ("png", "webp", "JPG")] == [
        "PNG",
        "WEBP",
        "JPEG",
    ]
    assert Image.open(tmp_path / "images" / "1_tench_seed0.png").size == (8, 8)

    def killed(picture, file, *arguments):
        file.write(b"half a picture")
        raise KeyboardInterrupt

    before = (tmp_path / "grid.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        call(student, tmp_path / "grid.png", "--labels", "tench", "--images_per_label", "1")
    assert (tmp_path / "grid.png").read_bytes() == before


def test_names_of_classes_of_any_length_fit_into_names_of_files(tmp_path):
    names = {n: f"{n} of " + "a shark " * 50 for n in range(3)}
    OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler(), id2label=names).save_pretrained(tmp_path)
    call(tmp_path, f"{tmp_path}/images/", "--images_per_label", "1")
    found = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert found == [f"{n}_{(f'{n}-of' + '-a-shark' * 50)[:60]}_seed0.png" for n in range(3)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "goldfich"], "Did you mean 'goldfish'"),
        (["--labels", "3"], "classes 0 to 2"),
        (["--images_per_label", "0"], "`images_per_label` must be at least 1"),
        (["--batch_size", "0"], "`batch_size` must be at least 1"),
        (["--dtype", "int8"], "choose one of: float32"),
        (["--device", "cuda:99"], "`device` 'cuda:99' cannot be used"),
        (["--device", "toaster"], "`device` 'toaster' cannot be used"),
        (["--device", "meta"], "`device` 'meta' cannot be used"),
        (["--out", "nowhere/grid.png"], "folder that exists"),
        (["--out", "grid.gif2"], "folder that exists"),
        (["--pipeline", "no/such"], "Cannot load the student 'no/such'"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(student, tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        call(student, tmp_path / "grid.png", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_student_of_several_steps_takes_those_it_was_trained_for(tmp_path, capsys):
    scheduler = StochasticInterpolantScheduler(solver="renoise", student_steps=[1, 4])
    OneStepInterpolantPipeline(tiny_sit(), scheduler).save_pretrained(tmp_path / "student")
    for steps, words in (([], "4 network evaluations"), (["--num_inference_steps", "1"], "one network evaluation")):
        call(tmp_path / "student", tmp_path / "grid.png", "--images_per_label", "1", *steps)
        assert f"Saved 3 images, {words} each" in capsys.readouterr().out
    with pytest.raises(InputError, match="`num_inference_steps` is 2, but this student has 1, 4 steps"):
        call(tmp_path / "student", tmp_path / "grid.png", "--num_inference_steps", "2")


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """A student of grey 8×8 images from 4×4 ones, with three classes."""
    folder = tmp_path_factory.mktemp("bridge")
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample", noise_channels=1)
    OneStepInterpolantPipeline(
        tiny_sit(condition_channels=2), scheduler, image_upsampling={"factor": 2, "mode": "nearest"}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    for n, mode in enumerate(("L", "RGB", "RGBA")):
        Image.new("RGB", (4, 4), (60 * n + 40,) * 3).convert(mode).save(folder / f"{n}.png")
    Image.new("L", (5, 4)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_files_are_enlarged_by_the_script(bridge, small, tmp_path):
    """The real script, in a process of its own: a file for each input and seed, which is the pipeline's own."""
    files = [str(small / f"{n}.png") for n in range(3)]
    command = [sys.executable, str(SCRIPT), "--pipeline", str(bridge), "--image", *files, "--labels", "2"]
    options = ["--images_per_label", "2", "--seed", "4", "--out", f"{tmp_path}/"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Saved 6 images" in done.stdout
    names = {f"2_2_{n}_{n}_seed{seed}.png" for n in range(3) for seed in (4, 5)}
    assert {path.name for path in tmp_path.iterdir()} == names
    pipeline = OneStepInterpolantPipeline.from_pretrained(bridge)
    with Image.open(files[1]) as image:
        wanted = pipeline([2], image=image.convert("L"), generator=torch.Generator().manual_seed(5)).images[0]
    difference = ImageChops.difference(wanted, Image.open(tmp_path / "2_2_1_1_seed5.png"))
    assert difference.getextrema()[1] <= 1
    wrong = subprocess.run([*command, "--image", files[0], "gone.png"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "error: The image gone.png cannot be read" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_grid_of_a_bridge_begins_with_its_inputs(bridge, small, tmp_path):
    images = [str(small / f"{n}.png") for n in range(3)]
    call(bridge, tmp_path / "grid.png", "--image", *images, "--labels", "0", "1", "2", "--images_per_label", "3")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height > 4 * 48  # inputs and three seeds
    left = grid.width - 3 * (48 + 4)
    levels = [grid.getpixel((left + n * 52 + 24, 24 + 24))[0] for n in range(3)]
    assert levels == [40, 100, 160]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "turns images into others: give --image FILE"),
        (["--image", "0.png", "1.png", "--labels", "0", "1", "2"], "There are 2 images and 3 labels"),
        (["--image", "0.png"], "There are 1 images and 0 labels"),
        (
            ["--image", "wide.png", "--labels", "0"],
            r"`image` has 5×4 pixels, but this network takes 8×8, or the small ones",
        ),
        (["--image", "0.png", "wide.png", "--labels", "0"], r"different sizes \(4×4, 5×4\)"),
        (["--image", "broken.png", "--labels", "0"], "broken.png cannot be read"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_a_sentence(bridge, small, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(small)
    with pytest.raises(InputError, match=words):
        call(bridge, tmp_path / "grid.png", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_student_on_noise_takes_no_image(student, small, tmp_path):
    with pytest.raises(InputError, match="generates from noise alone: leave it out"):
        call(student, tmp_path / "grid.png", "--image", str(small / "0.png"), "--labels", "0")
