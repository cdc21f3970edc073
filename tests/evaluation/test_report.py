"""The whole evaluation in one process: what the result says, other sources of images, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import tiny_sit
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.data import DataConfig
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.features import PIXELS
from si_distill.evaluation.metrics import METRICS, Comparison
from si_distill.evaluation.report import evaluate
from si_distill.evaluation.table import format_table


@pytest.fixture
def student_folder(teacher_folder, tmp_path):
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    OneStepInterpolantPipeline(**teacher.components, **teacher.parameters).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def quick(**settings) -> EvaluationConfig:
    return EvaluationConfig(**{"kid_subsets": 2, "bootstrap_resamples": 20, **settings})


def test_the_report_says_how_it_was_measured(teacher_folder, student_folder):
    (student_folder / "config.yaml").write_text("ema_decay: 0.995\nguidance_scale: 1.5\n")
    settings = quick(pipeline=str(student_folder), teacher=str(teacher_folder), teacher_steps=[1, 2], num_samples=60)
    result = evaluate(settings)
    assert json.loads((student_folder / "evaluation.json").read_text()) == result
    for name in ("evaluation.png", "evaluation_quality.png", "evaluation_neighbours.png"):
        with Image.open(student_folder / name) as picture:
            assert min(picture.size) > 100
    by_name = {row["generator"]: row for row in result["rows"]}
    # The same network, noise and labels: one Euler step on the linear path is the one-step map.
    one, student = by_name["teacher, 1 step"], by_name["student, 1 step"]
    for figure in ("Fréchet distance", "KID", "precision", "recall", "label accuracy", "nearest real distance"):
        assert one[figure] == pytest.approx(student[figure], rel=1e-6)
    assert [row["network evaluations"] for row in result["rows"]] == [1, 2, 1, None]
    floor = by_name["real half against real half"]
    assert floor["Fréchet distance"] < 1
    low, high = student["intervals"]["Fréchet distance"]
    assert low < student["Fréchet distance"] < high
    assert (result["num_samples"], result["reference"]["images"], result["seed"]) == (60, 1797, 0)
    assert result["evaluator"].startswith("torch-fidelity 0.")
    assert result["features"]["features"] == "pixels"
    assert (student["made"]["ema"], student["made"]["distilled with guidance_scale"]) == ("decay 0.995", 1.5)
    assert (by_name["teacher, 2 steps"]["made"]["solver"], student["made"]["dtype"]) == ("euler", "float32")
    assert sum(row["images"] for row in student["per class"].values()) == 60
    table = format_table(result)
    assert (student_folder / "evaluation.md").read_text() == table + "\n"
    assert table.startswith("| generator | network evaluations | Fréchet distance | KID |")
    assert "no FID" in table
    assert "inception score" not in table  # pixels have no logits

    # Another seed leaves no features of this one behind.
    features = student_folder / "evaluation_features"
    folders = set(features.glob("*/"))
    evaluate(quick(pipeline=str(student_folder), num_samples=8, seed=1))
    assert len(folders) == 3
    assert len(set(features.glob("*/")) & folders) == 0


@pytest.fixture
def rgb(tmp_path):
    """An image folder of two classes in RGB, and a student that fits it."""
    rng = np.random.default_rng(0)
    for n in range(60):
        folder = tmp_path / "real" / "train" / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n:03d}.png")
    network = tiny_sit(in_channels=3, num_classes=2)
    OneStepInterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(tmp_path / "rgb")
    return dict(pipeline=str(tmp_path / "rgb"), data=DataConfig(name=str(tmp_path / "real")))


def test_figures_are_those_of_torch_fidelity_on_the_saved_pictures(rgb, tmp_path):
    settings = quick(
        **rgb, save_images=True, save_npz=True, output=str(tmp_path / "e.json"), metrics=["fid", "kid", "prc"]
    )
    row = evaluate(settings)["rows"][0]
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "e_student_1_step"),
        input2=str(tmp_path / "real"),
        samples_find_deep=True,
        feature_extractor=PIXELS,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=60,
        kid_subsets=1,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert row["Fréchet distance"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert row["KID"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4, abs=1e-7)
    assert (row["precision"], row["recall"]) == pytest.approx((expected["precision"], expected["recall"]))

    # The same images from the folder and from the .npz have the same figures.
    for images in ("e_student_1_step", "e_student_1_step.npz"):
        files = quick(images=str(tmp_path / images), data=rgb["data"], output=str(tmp_path / "files.json"))
        (again, _) = evaluate(files)["rows"]
        assert again["network evaluations"] is None
        for figure in ("Fréchet distance", "KID", "precision", "recall"):
            assert again[figure] == pytest.approx(row[figure], rel=1e-6, abs=1e-9), figure


def test_a_reference_file_stands_for_the_data_set(rgb, tmp_path):
    cache = tmp_path / "cache"
    first = evaluate(quick(**rgb, cache_dir=str(cache), num_samples=30, class_balance="uniform"))
    (path,) = cache.glob("*.npz")
    settings = dict(pipeline=rgb["pipeline"], class_balance="uniform", num_samples=30)
    second = evaluate(quick(**settings, reference=str(path)))
    assert [r["Fréchet distance"] for r in second["rows"]] == [r["Fréchet distance"] for r in first["rows"]]

    # Published statistics have no features: what needs them is left out.
    with np.load(path) as file:
        np.savez(tmp_path / "published.npz", mu=file["mu"], sigma=file["sigma"])
    (row,) = evaluate(quick(**settings, reference=str(tmp_path / "published.npz")))["rows"]
    assert row["Fréchet distance"] == pytest.approx(first["rows"][0]["Fréchet distance"], rel=1e-12)
    assert row["KID"] is row["precision"] is row["nearest real distance"] is None
    with pytest.raises(InputError, match="--class_balance uniform does without it"):
        evaluate(quick(pipeline=rgb["pipeline"], reference=str(path)))  # `data` is the digits
    with pytest.raises(InputError, match="does not say how many images it has: set `num_samples`"):
        evaluate(quick(**{**settings, "num_samples": None}, reference=str(tmp_path / "published.npz")))


def test_logits_of_a_custom_extractor_give_inception_score_and_label_accuracy(rgb, tmp_path, monkeypatch):
    (tmp_path / "brightness.py").write_text(
        "def Brightness():\n"
        "    def features(images):\n"
        "        means = images.double().mean((2, 3))\n"
        "        return means, (means[:, :1] - 128) * images.new_tensor([1.0, -1.0], dtype=means.dtype)\n"
        "    return features\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = evaluate(quick(**rgb, features="brightness:Brightness", num_samples=40, save_npz=True))["rows"][0]
    with np.load(tmp_path / "rgb" / "evaluation_student_1_step.npz") as file:
        shown = (file["arr_0"][..., 0].mean((1, 2)) < 128).astype(int)
        assert row["label accuracy"] == (shown == file["arr_1"]).mean()
    assert 1 <= row["inception score"] <= 2


def test_a_teacher_alone_with_several_solvers(teacher_folder, tmp_path):
    settings = quick(teacher=str(teacher_folder), teacher_steps=[2], num_samples=8, output=str(tmp_path / "e.json"))
    settings.solver = ["euler", "heun", "sde_euler", "dopri5"]
    settings.solver_kwargs = {"rtol": 1e-2, "atol": 1e-2}
    rows = evaluate(settings)["rows"]
    assert [(row["generator"], row["network evaluations"]) for row in rows[:3]] == [
        ("teacher, 2 steps, euler", 2),
        ("teacher, 2 steps, heun", 3),
        ("teacher, 2 steps, sde_euler", 2),
    ]
    assert rows[3]["generator"] == "teacher, dopri5"
    assert rows[3]["network evaluations"] > 6
    # Noise of the sampler belongs to the image, too.
    sde = quick(teacher=str(teacher_folder), teacher_steps=[2], solver=["sde_euler"], num_samples=8, batch_size=3)
    sde.output = str(tmp_path / "again.json")
    assert evaluate(sde)["rows"][0]["Fréchet distance"] == pytest.approx(rows[2]["Fréchet distance"], rel=1e-3)


def test_what_does_not_fit_is_refused(teacher_folder, student_folder, tmp_path):
    folder = str(student_folder)
    three = str(tmp_path / "three")
    OneStepInterpolantPipeline(tiny_sit(num_classes=3), StochasticInterpolantScheduler()).save_pretrained(three)
    Image.fromarray(torch.zeros(4, 4, dtype=torch.uint8).numpy()).save(tmp_path / "small.png")
    for settings, words in (
        (dict(pipeline=str(tmp_path / "nowhere")), "Cannot load"),
        (dict(pipeline=folder, teacher=folder), "Cannot load"),
        (dict(pipeline=three), "3 classes and the reference sklearn-digits has 10"),
        (dict(pipeline=three, teacher=str(teacher_folder)), "make different images"),
        (dict(pipeline=folder, data=DataConfig(image_size=16)), "8×8"),
        (dict(pipeline=folder, output=str(tmp_path / "no" / "result.json")), "does not exist"),
        (dict(pipeline=folder, output=str(tmp_path / "result.txt")), "must end in .json"),
        (dict(images=str(tmp_path)), "4×4 pixels and the reference sklearn-digits has 8×8"),
        (dict(), "nothing to evaluate"),
        (dict(pipeline=folder, teacher_steps=[0]), "teacher_steps"),
        (dict(pipeline=folder, solver=["newton"]), "`solver` holds 'newton'"),
        (dict(pipeline=folder, metrics=["lpips"]), "`metrics` holds 'lpips'"),
        (dict(pipeline=folder, num_samples=3), "num_samples"),
        (dict(pipeline=folder, bootstrap_resamples=1), "0 or at least 2"),
        (dict(pipeline=folder, guidance_interval=[0.5]), "guidance_interval"),
        (dict(teacher=str(teacher_folder), solver=["sde_euler"]), "`teacher, 1 step` cannot be made: .* 2 for an SDE"),
        (dict(teacher=str(teacher_folder), guidance_scale=-1.0), "`teacher, 1 step` cannot be made: `guidance_scale`"),
        (dict(pipeline=folder, reference=str(tmp_path / "none.npz")), "Cannot read reference statistics"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(EvaluationConfig(**settings))


@pytest.mark.parametrize(
    ("link", "settings"),
    [
        ("o_features", {}),
        ("o_features/0123456789abcdef", {}),
        ("o.png", {}),
        ("o_quality.png", {}),
        ("o.json", {}),
        ("o_student_1_step", {"save_images": True}),
        ("o_student_1_step.npz", {"save_npz": True}),
    ],
)
def test_links_next_to_the_output_are_refused_before_anything_is_written(student_folder, tmp_path, link, settings):
    home, place = tmp_path / "home", tmp_path / "here" / link
    (home / "letters").mkdir(parents=True)
    place.parent.mkdir(parents=True)
    place.symlink_to(home)
    with pytest.raises(InputError, match=f"{link} is a link to"):
        evaluate(
            quick(pipeline=str(student_folder), output=str(tmp_path / "here" / "o.json"), num_samples=4, **settings)
        )
    assert [path.name for path in home.iterdir()] == ["letters"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == [link.split("/")[0]]


def test_only_features_of_evaluations_are_deleted(student_folder, tmp_path):
    foreign = tmp_path / "o_features"
    for name in ("mine", "0123456789abcdef"):
        (foreign / name).mkdir(parents=True)
        (foreign / name / "manifest.json").write_text("{}")
    settings = dict(pipeline=str(student_folder), output=str(tmp_path / "o.json"), num_samples=4)
    for seed in (0, 1):
        evaluate(quick(**settings, seed=seed, save_images=True))
        assert len(list(foreign.glob("*/"))) == 3
    assert {"mine", "0123456789abcdef"} < {path.name for path in foreign.glob("*/")}
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "o.md").unlink()
    (tmp_path / "o.md").mkdir()
    with pytest.raises(InputError, match=r"o.md is to be written and is not a file"):
        evaluate(quick(**settings))


def test_a_second_evaluation_with_the_same_output_is_refused(student_folder, tmp_path):
    held = (
        "import pathlib, sys; from si_distill.files import FolderLock; "
        "FolderLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", held, str(tmp_path / "o_features")], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=rf"Another process is writing to .*o_features \(process {other.pid}"):
            evaluate(quick(pipeline=str(student_folder), output=str(tmp_path / "o.json")))
        other.stdin.close()
    assert [path.name for path in tmp_path.glob("o*")] == ["o_features"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("ema_decay: fast", "`ema_decay` must be a number, got 'fast'"),
        ("ema_decay: null", "`ema_decay` must be a number, got None"),
        ("ema_decay: .nan", "`ema_decay` is nan"),
        (f"ema_decay: 1{'0' * 399}", "`ema_decay` is 1"),
        ("ema_halflife_images: [1]", "`ema_halflife_images` must be a number"),
        ("guidance_scale: .inf", "`guidance_scale` is inf"),
    ],
)
def test_settings_of_a_run_that_say_nothing_are_refused(student_folder, values, words):
    (student_folder / "config.yaml").write_text(values)
    with pytest.raises(InputError, match=f"config.yaml, {words}"):
        evaluate(quick(pipeline=str(student_folder), num_samples=4))


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((1, 8, 8, 1), None, "holds one image"),
        ((4, 8, 8, 1), [0, 1, 2, 10], "run from 0 to 10, but there are 10 classes"),
        ((4, 8, 8, 1), [0, 1, 2, -1], "run from -1 to 2"),
        ((4, 4, 8, 1), None, "makes images of 8×8 pixels and the finished images have 8×4"),
    ],
)
def test_samples_that_fit_nothing_are_refused(student_folder, tmp_path, shape, labels, words):
    values = dict(arr_0=np.zeros(shape, np.uint8)) | ({} if labels is None else {"arr_1": np.array(labels)})
    np.savez(tmp_path / "a.npz", **values)
    with pytest.raises(InputError, match=words):
        evaluate(quick(images=str(tmp_path / "a.npz"), pipeline=str(student_folder), num_samples=4))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_figure_that_is_not_finite_is_none():
    features = torch.full((8, 2), 1e12)
    comparison = Comparison(features, features, (np.zeros(2), np.eye(2)), kid_subsets=1)
    assert METRICS["KID"].figure(comparison) == (None, None)
