"""`pipelines/generate.py`: labels, seeds, batches and places of its images, and what it refuses."""

import runpy
from pathlib import Path

import pytest
from helpers import tiny_sit
from PIL import Image, ImageChops

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError

generate = runpy.run_path(str(Path(__file__).parent.parent.parent / "pipelines" / "generate.py"))["main"]
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
        (["--out", "nowhere/grid.png"], "folder that exists"),
        (["--out", "grid.gif2"], "folder that exists"),
        (["--pipeline", "no/such"], "Cannot load the student 'no/such'"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(student, tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        call(student, tmp_path / "grid.png", *arguments)
    assert not list(tmp_path.iterdir())
