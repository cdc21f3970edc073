"""Metrics against closed forms, and generation that depends on (seed, index) alone."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import tiny_sit

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.data import DataConfig
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.generation import generate_images
from si_distill.evaluation.metrics import DigitsClassifier, frechet_distance
from si_distill.evaluation.report import COLUMNS, evaluate, format_table


def images(seed: int, count: int = 200, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, (count, 1, 2, 2), dtype=np.uint8))


def closed_form(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖m1 − m2‖² + tr(C1 + C2 − 2 (C1^½ C2 C1^½)^½), by symmetric eigenvalues (torch-fidelity: eigenvalues of C1 C2)."""
    a, b = (v.flatten(1).double().numpy() / 127.5 - 1 for v in (x, y))
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross)


def test_frechet_distance_is_the_closed_form():
    x, y = images(0), images(1, 150, 40, 200)
    assert frechet_distance(x, y) == pytest.approx(closed_form(x, y), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_square():
    x = images(2, high=200)
    shift = 51
    assert frechet_distance(x, x + shift) == pytest.approx(4 * (shift / 127.5) ** 2, rel=1e-9)


def test_frechet_distance_refuses_other_things():
    with pytest.raises(ValueError, match="`images` must be at least two uint8 images"):
        frechet_distance(images(0).float(), images(0))
    with pytest.raises(ValueError, match=r"`reference` .*\(1, 1, 2, 2\)"):
        frechet_distance(images(0), images(0, 1))


def test_classifier_knows_what_it_was_shown():
    shown = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    shown[10:, :, :4] = 255
    labels = [0] * 10 + [1] * 10
    classifier = DigitsClassifier(shown, labels)
    assert classifier.accuracy(shown, labels) == 1
    assert classifier.accuracy(shown, [1] * 10 + labels[10:]) == 0.5


@pytest.fixture
def student():
    pipeline = OneStepInterpolantPipeline(tiny_sit(num_classes=10), StochasticInterpolantScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_images_do_not_depend_on_the_batch_size(student):
    labels = [n % 10 for n in range(23)]
    call = partial(student, output_type="pt")
    made = {size: generate_images(student, call, labels, 5, size, "") for size in (1, 7, 64)}
    for size in (1, 7):
        # Matrix products of another batch may round a value to the neighbouring level.
        difference = (made[size].images.int() - made[64].images.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3
    other_seed = generate_images(student, call, labels, 6, 64, "").images
    assert (other_seed != made[64].images).any(dim=(1, 2, 3)).all()


def test_evaluations_are_those_of_the_network(student):
    teacher = InterpolantPipeline(**student.components)
    teacher.set_progress_bar_config(disable=True)
    labels = [0, 1, 2]
    assert generate_images(student, partial(student, output_type="pt"), labels, 0, 2, "").evaluations == 1
    for arguments, expected in (
        (dict(num_inference_steps=4, solver="euler"), 4),
        (dict(num_inference_steps=4, solver="heun"), 7),
        (dict(num_inference_steps=4, solver="euler", guidance_scale=2.0), 8),  # conditional and unconditional
    ):
        call = partial(teacher, output_type="pt", **arguments)
        assert generate_images(teacher, call, labels, 0, 2, "").evaluations == expected


def test_the_report_says_how_it_was_measured(teacher_folder, tmp_path):
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    folder = tmp_path / "student"
    OneStepInterpolantPipeline(**teacher.components, **teacher.parameters).save_pretrained(folder)
    settings = EvaluationConfig(pipeline=str(folder), teacher=str(teacher_folder), teacher_steps=[1, 2], num_samples=30)
    result = evaluate(settings)
    assert json.loads((folder / "evaluation.json").read_text()) == result
    assert (folder / "evaluation.png").stat().st_size > 0
    by_name = {row["generator"]: row for row in result["rows"]}
    # The same network, noise and labels: one Euler step on the linear path is the one-step map.
    one, student = by_name["teacher, 1 step"], by_name["student, 1 step"]
    assert one["Fréchet distance"] == pytest.approx(student["Fréchet distance"], rel=1e-6)
    assert [row["network evaluations"] for row in result["rows"]] == [1, 2, 1, None]
    assert by_name["real half against real half"]["Fréchet distance"] < 1
    assert (result["num_samples"], result["reference"]["images"], result["seed"]) == (30, 1797, 0)
    assert result["evaluator"].startswith("torch-fidelity 0.")
    table = format_table(result)
    assert table.splitlines()[0] == f"| {' | '.join(COLUMNS)} |"
    assert "not Inception" in table


def test_what_does_not_fit_is_refused(teacher_folder, tmp_path):
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    folder = str(tmp_path / "student")
    OneStepInterpolantPipeline(**teacher.components).save_pretrained(folder)
    three = str(tmp_path / "three")
    OneStepInterpolantPipeline(tiny_sit(num_classes=3), StochasticInterpolantScheduler()).save_pretrained(three)
    for settings, words in (
        (dict(pipeline=str(tmp_path / "nowhere")), "Cannot load"),
        (dict(pipeline=folder, teacher=folder), "Cannot load"),
        (dict(pipeline=three), "3 classes and the reference sklearn-digits has 10"),
        (dict(pipeline=folder, data=DataConfig(image_size=16)), "8×8"),
        (dict(pipeline=folder, output=str(tmp_path / "no" / "result.json")), "does not exist"),
        (dict(pipeline=""), "`pipeline` is not set"),
        (dict(pipeline=folder, teacher_steps=[0]), "teacher_steps"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(EvaluationConfig(**settings))
