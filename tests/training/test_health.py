"""Warnings come when the game goes wrong for several lines in a row, and say what to try."""

import pytest
import torch

from si_distill.training.distillation.health import PATIENCE, HealthMonitor
from si_distill.training.distillation.text_health import image_means

GOOD = dict(field_distance=0.2, sample_std=0.7, critic_matching_loss=0.4, teacher_matching_loss=0.6)


def spell(**trouble) -> list[list[str]]:
    monitor = HealthMonitor()
    for distance in (0.01, 0.3, 0.2):  # the critic gets to know the student, then the student learns
        assert monitor.check({**GOOD, "field_distance": distance}) == []
    return [monitor.check({**GOOD, **trouble}) for _ in range(PATIENCE + 2)]


def test_a_healthy_game_is_silent():
    assert spell() == [[]] * (PATIENCE + 2)


def test_each_trouble_is_told_once_after_it_has_lasted():
    for trouble, word in (
        (dict(critic_matching_loss=0.7), "critic_steps"),
        (dict(field_distance=2.5), "drift apart"),
        (dict(sample_std=0.1), "collapses"),
        (dict(sample_std=3.0), "explodes"),
    ):
        told = spell(**trouble)
        assert [len(warnings) for warnings in told] == [0] * (PATIENCE - 1) + [1, 0, 0]
        assert word in told[PATIENCE - 1][0]


def test_the_rise_while_the_critic_learns_is_no_drift():
    monitor = HealthMonitor()
    for distance in (0.0, 0.001, 0.02, 0.1, 0.3, 0.5, 0.6, 0.6):
        assert monitor.check({**GOOD, "field_distance": distance}) == []


def test_a_single_bad_line_is_noise():
    monitor = HealthMonitor()
    for _ in range(10):
        assert monitor.check(GOOD) == []
        assert monitor.check({**GOOD, "field_distance": 5.0}) == []


def test_nothing_is_said_before_the_generator_learns():
    assert HealthMonitor().check({"critic_loss": 1.0}) == []


def told_of_images(first: dict[str, float], later: dict[str, float]) -> list[str]:
    """Lines of images need no losses in them."""
    monitor = HealthMonitor()
    assert monitor.check(first) == []
    told = [monitor.check(later) for _ in range(PATIENCE + 2)]
    assert [bool(warnings) for warnings in told] in ([False] * len(told), [n == PATIENCE - 1 for n in range(len(told))])
    return told[PATIENCE - 1]


def test_saturated_images_and_images_alike_of_one_prompt_are_told():
    good = dict(saturation=0.03, prompt_diversity=0.4)
    assert told_of_images(good, dict(saturation=0.05, prompt_diversity=0.3)) == []
    assert "10.0% of the values" in told_of_images(good, good | dict(saturation=0.1))[0]
    assert "become alike" in told_of_images(good, good | dict(prompt_diversity=0.1))[0]
    # The teacher's own figures count before the student's first ones: its images may have been alike at the start.
    teacher = dict(teacher_saturation=0.2, teacher_prompt_diversity=0.9)
    assert "become alike" in told_of_images({**good, "prompt_diversity": 0.9}, {**good, **teacher})[0]
    assert told_of_images(good, {**good, **teacher, "saturation": 0.3, "prompt_diversity": 0.6}) == []


def test_means_of_images_are_of_what_is_seen():
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    assert image_means(images, 1) == {"saturation": 0}
    images[0, :, :2] = 1.3  # beyond the end, as decoders give it; a half of one of four images
    means = image_means(images, 2)
    assert means["saturation"] == pytest.approx(1 / 8)
    assert 0 < means["prompt_diversity"] < 2
    assert image_means(images[[0, 0, 1, 1]], 2)["prompt_diversity"] == pytest.approx(0, abs=1e-9)
