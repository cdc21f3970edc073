"""The Space as visitors meet it: the real app in a process of its own, and a real headless Chromium."""

import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import tiny_sit
from PIL import Image, ImageChops

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.sampling import sample_rows
from si_distill.visualization import image_grid

pytestmark = pytest.mark.space
ROOT = Path(__file__).parent.parent.parent
PORT = 7931


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    network = tiny_sit(seed=1, num_classes=10)
    folder = tmp_path_factory.mktemp("runs") / "tiny-student"
    OneStepInterpolantPipeline(network, teacher.scheduler, id2label=teacher.config.id2label).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def space(student_folder, teacher_folder):
    """The address of the app on a student and its teacher, without a connection to anything else."""
    address = f"http://127.0.0.1:{PORT}"
    script = [sys.executable, ROOT / "pipelines" / "space" / "app.py", "--port", PORT]
    process = subprocess.Popen(
        [*map(str, script), "--student", str(student_folder), "--teacher", str(teacher_folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert executable, "There is no Chromium: apt-get install chromium, or set CHROMIUM to one."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(space, browser):
    """Opens the page as a new visitor; nothing may be fetched from elsewhere, and no error may reach the console."""
    contexts, problems = [], []

    def open_page():
        contexts.append(browser.new_context(accept_downloads=True, viewport={"width": 1240, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: _local(request.url, space) or problems.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(space, wait_until="domcontentloaded")
        page.wait_for_selector("#generate")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def _local(url: str, space: str) -> bool:
    return url.startswith((space, "data:", "blob:"))


def set_number(page, place: str, value: int) -> None:
    field = page.locator(f"{place} input[type=number]").first
    field.fill(str(value))
    field.press("Tab")


def choose_classes(page, *names: str) -> None:
    field = page.locator("#classes input").first
    for _ in range(10):
        field.press("Backspace")
    for name in names:
        field.fill(name)
        page.get_by_role("option", name=name, exact=True).click()
    field.press("Escape")


def picture(page, place: str) -> Image.Image:
    page.wait_for_selector(f"{place} img")
    source = page.locator(f"{place} img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def wait_for_verdict(page, steps: int) -> None:
    page.locator("#verdict strong", has_text=f"{steps} times").wait_for()


def expected(folder, cls, labels, rows, seed, **kwargs) -> Image.Image:
    pipeline = cls.from_pretrained(folder)
    images = sample_rows(pipeline, labels, rows, seed, **kwargs)
    return image_grid(images, column_titles=[str(label) for label in labels], min_cell=72)


def assert_same(found: Image.Image, wanted: Image.Image) -> None:
    """Equal but for rounding: other numbers of threads sum in another order."""
    assert found.size == wanted.size
    assert max(high for _, high in ImageChops.difference(found, wanted).getextrema()) <= 1


def test_a_visitor_chooses_generates_compares_and_downloads(visit, student_folder, teacher_folder):
    page = visit()
    choose_classes(page, "5", "8")
    set_number(page, "#count", 2)
    set_number(page, "#seed", 11)
    set_number(page, "#steps", 7)
    page.click("#generate")
    wait_for_verdict(page, 7)
    assert page.inner_text("#student-facts").split()[:2] == ["1", "evaluation"]
    assert page.inner_text("#teacher-facts").split()[:2] == ["7", "evaluations"]
    student = expected(student_folder, OneStepInterpolantPipeline, [5, 8], 2, 11)
    teacher = expected(teacher_folder, InterpolantPipeline, [5, 8], 2, 11, num_inference_steps=7)
    assert_same(picture(page, "#student-picture"), student)
    assert_same(picture(page, "#teacher-picture"), teacher)

    with page.expect_download() as download:
        page.click("#download")
    file = Image.open(download.value.path())
    assert file.format == "PNG"
    assert file.width > student.width + teacher.width  # side by side

    # Without the teacher: its picture of the last time must not stay beside other images.
    page.click("#compare input")
    page.click("#generate")
    page.wait_for_selector("#teacher-picture img", state="detached")
    assert page.inner_text("#verdict").strip() == ""


def test_bad_input_is_a_message_and_the_page_goes_on(visit, student_folder):
    page = visit()
    choose_classes(page)
    page.click("#generate")
    page.locator(".toast-body", has_text="Choose at least one class").wait_for()
    choose_classes(page, *map(str, range(10)))
    set_number(page, "#count", 8)
    page.click("#generate")
    page.locator(".toast-body", has_text="at most 12 classes and 48 images").wait_for()
    name = page.locator("#student input").first
    for typed, words in (("../etc", "is no student"), ("nobody/nothing", "cannot be read from the Hub")):
        name.fill(typed)
        name.press("Enter")
        page.locator(".toast-body", has_text=words).first.wait_for()
    name.fill(student_folder.name)
    name.press("Enter")
    choose_classes(page, "4")
    set_number(page, "#count", 1)
    page.click("#generate")
    page.wait_for_selector("#verdict strong")
    assert_same(picture(page, "#student-picture"), expected(student_folder, OneStepInterpolantPipeline, [4], 1, 0))


def test_two_visitors_at_once_see_each_their_own(visit, student_folder, teacher_folder):
    pages = [(visit(), 1), (visit(), 9)]
    for page, label in pages:
        choose_classes(page, str(label))
        set_number(page, "#count", 3)
    for turn in range(3):
        for page, label in pages:
            set_number(page, "#seed", 10 * turn + label)
            set_number(page, "#steps", 50 + 10 * turn + label)  # differs by visitor and turn, so the verdict does
        for page, _ in pages:
            page.click("#generate", no_wait_after=True)
        for page, label in pages:
            seed, steps = 10 * turn + label, 50 + 10 * turn + label
            wait_for_verdict(page, steps)
            wanted = expected(student_folder, OneStepInterpolantPipeline, [label], 3, seed)
            assert_same(picture(page, "#student-picture"), wanted)
            wanted = expected(teacher_folder, InterpolantPipeline, [label], 3, seed, num_inference_steps=steps)
            assert_same(picture(page, "#teacher-picture"), wanted)
            assert page.inner_text("#teacher-facts").split()[0] == str(steps)
