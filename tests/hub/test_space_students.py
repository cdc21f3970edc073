"""What the Space does behind its page: limits, visitors' names, and several visitors on one network at once."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import tiny_sit
from latent_caches import tiny_autoencoder
from PIL import ImageChops, ImageStat

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "pipelines" / "space"))

import students as space
from students import (
    MAX_CLASSES,
    MAX_IMAGES,
    Choice,
    Students,
    VisitorError,
    check_declared,
    checked_choice,
    checked_request,
    configured,
)

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


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("transformer", {"num_layers": 300_000}, "declares transformer.num_layers = 300000"),
        ("transformer", {"sample_size": 1024}, "makes images of 1024 pixels"),
        ("transformer", {"sample_size": 264}, "makes images of 264 pixels"),
        ("transformer", {"sample_size": [8, 10**9]}, "too large"),
        ("transformer", {"sample_size": "8"}, "makes images of '8' pixels"),
        ("transformer", {"num_classes": 10**9}, "declares transformer.num_classes"),
        ("transformer", {"num_attention_heads": 1000, "attention_head_dim": 64}, "declares networks of [0-9,]+ values"),
        ("transformer", {"mlp_ratio": 1e300}, "declares transformer.mlp_ratio"),
        ("transformer", {"mlp_ratio": float("nan")}, "declares transformer.mlp_ratio"),
        ("transformer", {"_class_name": "Nothing"}, "of the class 'Nothing', which is not known here"),
        (
            "transformer",
            {"_class_name": "DiffusionPipeline"},
            "of the class 'DiffusionPipeline', which is not known here",
        ),
        ("transformer", {"_class_name": ["a"]}, "_class_name must be text"),
        ("vae", {"block_out_channels": [4] * 1000}, "declares vae.block_out_channels"),
        ("vae", {"layers_per_block": 10_000}, "declares vae.layers_per_block"),
    ],
)
def test_networks_that_declare_too_much_are_refused_before_they_are_built(tmp_path, part, values, words):
    network = tiny_sit(in_channels=4, num_classes=3, patch_size=2)
    OneStepInterpolantPipeline(network, StochasticInterpolantScheduler(), tiny_autoencoder()).save_pretrained(tmp_path)
    check_declared(tmp_path)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(VisitorError, match=words):
        Students().classes(Choice(str(tmp_path)))


def latent_student(folder, with_vae=True, **values):
    """A student on latents, in whose files are values that nobody checked when it was saved."""
    network = tiny_sit(in_channels=4, num_classes=3, class_dropout_prob=0.1)
    scheduler = StochasticInterpolantScheduler()
    OneStepInterpolantPipeline(network, scheduler, tiny_autoencoder() if with_vae else None).save_pretrained(folder)
    for name, changed in values.items():
        file = folder / (f"{name}/config.json" if name == "vae" else f"{name}.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return Choice(str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"with_vae": False}, "cannot be shown: .*no VAE to decode"),
        ({"model_index": {"guidance": {"scale": 1e308, "channels": 3}}}, "cannot be shown: .*not finite"),
        ({"model_index": {"guidance": {"scale": 10**400, "channels": 3}}}, "cannot be loaded: .*too large"),
        ({"vae": {"scaling_factor": 0}}, "cannot be shown: .*not finite"),
        ({"vae": {"scaling_factor": "text"}}, "cannot be shown: could not convert"),
        ({"vae": {"scaling_factor": [[1]]}}, "cannot be shown: .*real number"),
        ({"vae": {"latents_mean": [1, 2, 3]}}, "cannot be shown: .*must match"),
        ({"model_index": {"id2label": {"0": "shark " * 2000}}}, "a class whose name has 12,000 characters"),
        ({"model_index": {"id2label": {"0": 7}}}, "id2label.0 must be text"),
    ],
)
def test_whatever_the_files_of_a_student_hold_is_a_sentence(tmp_path, values, words):
    choice, students = latent_student(tmp_path / "student", **values), Students()
    with pytest.raises(VisitorError, match=words):
        list(students.sample(*students.prepare(choice, False), [0, 1], 1, 0, 1))


def test_a_damaged_card_or_teacher_is_a_sentence(choice, tmp_path):
    teacher = tmp_path / "teacher"
    InterpolantPipeline(tiny_sit(in_channels=4, num_classes=10), StochasticInterpolantScheduler()).save_pretrained(
        teacher
    )
    results = Students().sample(Path(choice.student), teacher, [0], 1, 0, 1)
    assert next(results).images == 1
    with pytest.raises(VisitorError, match=r"The teacher teacher cannot be shown: .*no VAE"):
        next(results)
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(VisitorError, match=r"The card of .* cannot be read: while parsing"):
        Students().teacher_folder(Choice(str(tmp_path)))


def test_a_full_memory_is_not_the_visitors_mistake(choice, monkeypatch):
    def full(*arguments, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(space, "sample_rows", full)
    with pytest.raises(torch.OutOfMemoryError):
        results_of(Students(), choice, 0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"students": [{"student": "a/b", "revision": null}', "Expecting"),
        ('{"students": [{"revision": "c0ffee"}]}', r"students\[0\] has no `student`"),
        ('{"students": [{"student": "a/b", "teacher": 7}]}', r"students\[0\].teacher must be"),
        ('{"students": [{"student": "a/b", "stundent": "c"}]}', "stundent"),
        ('{"students": []}', "names no students"),
        (None, "No such file"),
    ],
)
def test_settings_of_a_space_that_cannot_be_used_are_a_sentence(tmp_path, text, words):
    file = tmp_path / "space.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(VisitorError, match=words):
        configured(file)
    file.write_text('{"students": [{"student": "a/b", "revision": null, "teacher": "a/c"}]}')
    assert configured(file) == [Choice("a/b", teacher="a/c")]


def test_the_settings_of_a_student_reach_its_images(tmp_path):
    """The brightness of latents of EDM2: a pipeline for each request was built without `vae_pixel_min`."""
    network = tiny_sit(in_channels=4, num_classes=3)
    pipeline = OneStepInterpolantPipeline(
        network, StochasticInterpolantScheduler(), tiny_autoencoder(), vae_pixel_min=0.0
    )
    pipeline.save_pretrained(tmp_path / "student")
    students = Students()
    (result,) = students.sample(*students.prepare(Choice(str(tmp_path / "student")), False), [0, 1], 1, 5, 1)
    wanted = space.image_grid(space.sample_rows(pipeline, [0, 1], 1, 5), column_titles=["0", "1"], min_cell=72)
    assert ImageStat.Stat(result.picture).mean == pytest.approx(ImageStat.Stat(wanted).mean, abs=0.5)


def test_a_request_ends_in_the_middle_when_its_time_is_up(choice, monkeypatch):
    monkeypatch.setattr(space, "MAX_SECONDS", -1.0)
    students = Students()
    with pytest.raises(VisitorError, match="took longer than"):
        results_of(students, choice, 0, 3)
    monkeypatch.setattr(space, "MAX_SECONDS", 60.0)
    assert len(results_of(students, choice, 0, 3)) == 2  # the next visitor has the same network
    assert threading.active_count() < 50


def test_folders_of_earlier_visitors_are_deleted(choice, tmp_path, monkeypatch):
    fetched = []

    def fetch(name, revision, folder=None):
        (folder / name.split("/")[1]).write_text("weights")
        fetched.append(folder)
        return folder

    monkeypatch.setattr(space, "_fetch", fetch)  # the Hub
    students = Students()
    for n in range(10):
        students.folder(Choice(f"user/{n}", visitor=True))
    assert [folder.exists() for folder in fetched] == [False] * 4 + [True] * space.KEPT
    for folder in fetched[4:]:
        space.shutil.rmtree(folder)


def test_a_guidance_that_is_no_number_is_a_sentence(choice):
    path = Path(choice.student) / "config.yaml"
    for text in ("guidance_scale: [1]\n", "guidance_scale: .nan\n", "a: b: c\n", "guidance_scale: yes\n"):
        path.write_text(text)
        try:
            with pytest.raises(VisitorError):
                results_of(Students(), choice, 0, 3)
        finally:
            path.unlink()
