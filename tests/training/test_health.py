"""Warnings come when the game goes wrong for several lines in a row, and say what to try."""

from si_distill.training.distillation.health import PATIENCE, HealthMonitor

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
