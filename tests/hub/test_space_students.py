"""What the Space does behind its page: limits, visitors' names, and several visitors on one network at once."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import tiny_sit
from PIL import ImageChops

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "pipelines" / "space"))

from students import MAX_CLASSES, MAX_IMAGES, Choice, Students, VisitorError, checked_choice, checked_request

DIGITS = [str(n) for n in range(10)]


@pytest.fixture(scope="module")
def choice(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "student"
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    student = OneStepInterpolantPipeline(
        tiny_sit(seed=1, num_classes=10), teacher.scheduler, id2label=teacher.config.id2label
    )
    student.save_pretrained(folder)
    return Choice(str(folder), teacher=str(teacher_folder))


def results_of(students, choice, seed, steps):
    return list(students.sample(*students.prepare(choice, True), [3, 7], 2, seed, steps))


def test_visitors_at_once_get_what_each_would_get_alone(choice):
    requests = [(seed, steps) for seed in range(4) for steps in (3, 8)]
    students = Students()
    alone = [results_of(students, choice, *request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: results_of(students, choice, *request), requests * 3))
    for (_, steps), expected in zip(requests, alone, strict=True):
        assert [result.evaluations for result in expected] == [1, steps]
    for expected, found in zip(alone * 3, together, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert ImageChops.difference(one.picture, other.picture).getbbox() is None
            assert one.evaluations == other.evaluations


def test_the_teacher_has_the_guidance_that_is_inside_the_student(choice):
    path = Path(choice.student) / "config.yaml"
    path.write_text("guidance_scale: 2.0\n")
    try:
        assert [result.evaluations for result in results_of(Students(), choice, 0, 3)] == [1, 6]  # two for each step
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (([], DIGITS, 1, 0, 1), "at least one class"),
        ((["10"], DIGITS, 1, 0, 1), "no class '10'"),
        ((DIGITS, DIGITS, 8, 0, 1), f"at most {MAX_CLASSES} classes and {MAX_IMAGES} images"),
        ((["1"], DIGITS, 9, 0, 1), "images per class must be whole, from 1 to 8"),
        ((["1"], DIGITS, 1.5, 0, 1), "images per class"),
        ((["1"], DIGITS, True, 0, 1), "images per class"),
        ((["1"], DIGITS, 1, -1, 1), "seed must be a whole number from 0"),
        ((["1"], DIGITS, 1, None, 1), "seed must be a whole number"),
        ((["1"], DIGITS, 1, 0, 10_000), "teacher steps must be whole, from 1 to 100"),
    ],
)
def test_requests_outside_the_limits_are_refused_whoever_sends_them(request_, words):
    with pytest.raises(VisitorError, match=words):
        checked_request(*request_)


def test_requests_inside_the_limits_become_numbers():
    assert checked_request(["7", "3"], DIGITS, 2.0, 5, 50) == ([7, 3], 2, 5, 50)
    assert checked_request([], [], 2, 5, 50) == ([], 2, 5, 50)  # no classes to choose from


@pytest.mark.parametrize("name", ["", None, "/etc", "../runs/private", "runs", "a/b/c", "user/na me"])
def test_a_visitor_cannot_name_folders_of_the_machine(choice, name):
    with pytest.raises(VisitorError, match="is no student"):
        checked_choice(name, [choice])


def test_a_name_that_is_a_folder_here_is_a_repository_for_a_visitor(choice, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "student").symlink_to(choice.student)
    monkeypatch.chdir(tmp_path)
    visitors = checked_choice("runs/student", [choice])
    assert Students().classes(Choice("runs/student")) == DIGITS  # as the owner of the Space configures it
    with pytest.raises(VisitorError, match="cannot be read from the Hub"):
        Students().classes(visitors)
    assert checked_choice("student", [choice]) == choice


def test_a_student_that_turns_images_into_others_is_refused(tmp_path):
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample")
    OneStepInterpolantPipeline(tiny_sit(condition_channels=1), scheduler).save_pretrained(tmp_path / "bridge")
    with pytest.raises(VisitorError, match="bridge turns images into others, and this page has no place for images"):
        Students().classes(Choice(str(tmp_path / "bridge")))
