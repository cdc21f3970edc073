"""Compares one evaluation of the student with many of its teacher: a Gradio app, as a Space or on your machine.

    python pipelines/space/app.py --student runs/digits-student --teacher runs/digits-teacher

As a Space it shows the students of space.json, which `pipelines/publish.py --space` writes.
"""

import argparse
import html
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import spaces  # ZeroGPU: before torch
except ImportError:
    spaces = None

import gradio as gr
from students import (
    MAX_CLASSES,
    MAX_IMAGES,
    MAX_PER_CLASS,
    MAX_SEED,
    MAX_STEPS,
    Choice,
    Result,
    Students,
    VisitorError,
    checked_choice,
    checked_request,
    configured,
)

from si_distill.visualization import image_grid

HERE = Path(__file__).parent
#: Pictures to take home, until Gradio has copied them; the folder goes with the process.
DOWNLOADS, KEPT_SECONDS = tempfile.TemporaryDirectory(prefix="one-step-"), 600
STUDENTS = Students()

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.9rem; letter-spacing: -0.02em; margin-bottom: 0.1rem; }
#title p { color: var(--body-text-color-subdued); margin-top: 0; }
.facts { display: flex; justify-content: space-between; gap: 1rem; min-height: 2.9rem; max-width: 17rem; }
#student-facts, #teacher-facts { padding: 0 !important; }
#student-facts > *, #teacher-facts > * { padding: 0 !important; }
.facts div { display: flex; flex-direction: column; line-height: 1.25; }
.facts b { font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts span { font-size: 0.8rem; color: var(--body-text-color-subdued); white-space: nowrap; }
.column { gap: 0.6rem !important; }
.column h3 { margin: 0; }
#verdict p { font-size: 1.05rem; margin: 0.35rem 0; }
#note p { font-size: 0.85rem; color: var(--body-text-color-subdued); }
"""


NOTHING = '<div class="facts"></div>'


def theme() -> gr.themes.Base:
    """Plain and readable, with the fonts that the visitor's machine has: nothing is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=["ui-monospace", "monospace"]
    )


def on_gpu(function: Callable) -> Callable:
    """Borrows a GPU for the call where the Space has ZeroGPU; elsewhere the function itself."""
    return spaces.GPU(duration=60)(function) if spaces else function


@on_gpu
def sample(
    folder: Path, teacher: Path | None, labels: list[int], count: int, seed: int, steps: int
) -> Iterator[Result]:
    yield from STUDENTS.sample(folder, teacher, labels, count, seed, steps)


def facts(result: Result) -> str:
    """The line of numbers over a picture."""
    each = result.seconds / result.images
    time_each = f"{each * 1000:.1f} ms" if each < 1 else f"{each:.2f} s"
    numbers = (
        (f"{result.evaluations:g}", "evaluation" + ("s" if result.evaluations != 1 else "")),
        (time_each, "per image"),
        (f"{result.seconds:.2f} s", f"all {result.images}"),
    )
    return '<div class="facts">' + "".join(f"<div><b>{n}</b><span>{w}</span></div>" for n, w in numbers) + "</div>"


def shown(error: VisitorError) -> gr.Error:
    """The message of an error; names in it, of somebody else's repository, are no HTML."""
    return gr.Error(html.escape(str(error)), duration=8, print_exception=False)


def build(choices: list[Choice]) -> gr.Blocks:
    """The app for some students; the first is shown at the start."""
    classes = STUDENTS.classes(choices[0])

    def change_student(name: str):
        try:
            found = STUDENTS.classes(checked_choice(name, choices))
        except VisitorError as error:
            raise shown(error) from error
        return gr.update(choices=found, value=found[:4], visible=bool(found))

    def generate(name, names, count, seed, compare, steps):
        empty = (None, NOTHING, "", gr.update(interactive=False, value=None))
        try:
            choice = checked_choice(name, choices)
            request = checked_request(names or [], STUDENTS.classes(choice), count, seed, steps)
            folder, teacher = STUDENTS.prepare(choice, compare)
            results = sample(folder, teacher, *request)
            student = next(results)
            yield student.picture, facts(student), *empty
            if teacher is None:
                note = "No teacher to compare with: the student's card names none." if compare else ""
                yield student.picture, facts(student), None, NOTHING, note, _download(student)
                return
            slow = next(results)
        except VisitorError as error:
            raise shown(error) from error
        ratio = slow.seconds / student.seconds
        verdict = (
            f"The teacher took **{ratio:,.1f} times** as long, for **{slow.evaluations / student.evaluations:g} times** the "
            "evaluations. Both started from the same noise."
        )
        yield (student.picture, facts(student), slow.picture, facts(slow), verdict, _download(student, slow))

    with gr.Blocks(title="One step", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# One step\nA student draws an image in **one** evaluation of its network, or in a few. Its teacher solves an "
            "ODE, step by step, to the same end.",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                name = gr.Dropdown(
                    [choice.title for choice in choices],
                    value=choices[0].title,
                    label="Student",
                    info="From the list, or a repository of the Hub: user/name",
                    allow_custom_value=True,
                    elem_id="student",
                )
                labels = gr.Dropdown(
                    classes, value=classes[:4], multiselect=True, label="Classes", elem_id="classes", visible=bool(classes),
                    info=f"At most {MAX_CLASSES}",
                )  # fmt: skip
                count = gr.Slider(1, MAX_PER_CLASS, value=4, step=1, label="Images per class", elem_id="count")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
                compare = gr.Checkbox(True, label="Compare with the teacher", elem_id="compare")
                steps = gr.Slider(1, MAX_STEPS, value=50, step=1, label="Teacher steps", elem_id="steps")
                button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
            with gr.Column(scale=5, min_width=300, elem_classes="column"):
                gr.Markdown("### Student, 1 step")
                student_facts = gr.HTML(NOTHING, elem_id="student-facts", padding=False)
                student_picture = _picture("student-picture")
            with gr.Column(scale=5, min_width=300, elem_classes="column"):
                gr.Markdown("### Teacher, many steps")
                teacher_facts = gr.HTML(NOTHING, elem_id="teacher-facts", padding=False)
                teacher_picture = _picture("teacher-picture")
        with gr.Row(equal_height=True):
            with gr.Column(scale=4, min_width=300):
                verdict = gr.Markdown(elem_id="verdict")
            with gr.Column(scale=1, min_width=200):
                download = gr.DownloadButton("Download", interactive=False, elem_id="download")
        gr.Markdown(
            f"At most {MAX_IMAGES} images at once. Repositories are loaded with the classes of `si_distill`: their code is "
            "never run, and weights are safetensors only.",
            elem_id="note",
        )
        name.change(change_student, name, labels, api_name="classes", show_progress="hidden")
        gr.on(
            [button.click, seed.submit],
            generate,
            [name, labels, count, seed, compare, steps],
            [student_picture, student_facts, teacher_picture, teacher_facts, verdict, download],
            api_name="generate",
            concurrency_limit=2,  # visitors at once; more wait in the queue and see their place
        )
    return app.queue(max_size=32)


def _picture(elem_id: str) -> gr.Image:
    return gr.Image(
        label="", show_label=False, format="png", interactive=False, height=420, elem_id=elem_id,
        buttons=["download", "fullscreen"], placeholder="Choose classes and press Generate",
    )  # fmt: skip


def _download(*results: Result):
    """The picture, or both side by side, as a file to take home."""
    names = ["student", *["teacher"] * (len(results) - 1)]
    titles = [
        f"{name}, {result.evaluations:g} evaluation{'s' if result.evaluations != 1 else ''}"
        for name, result in zip(names, results, strict=True)
    ]
    for old in Path(DOWNLOADS.name).glob("*.png"):
        if old.stat().st_mtime < time.time() - KEPT_SECONDS:
            old.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=DOWNLOADS.name, suffix=".png", delete=False) as file:
        image_grid([[result.picture for result in results]], column_titles=titles).save(file, "PNG")
    return gr.update(value=file.name, interactive=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a folder, or a repository of the Hub; without it, those of space.json")
    parser.add_argument("--teacher", help="the teacher to compare with")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    arguments = parser.parse_args()
    try:
        if arguments.student:
            choices = [Choice(arguments.student, teacher=arguments.teacher)]
        elif (HERE / "space.json").is_file():
            choices = configured(HERE / "space.json")
        else:
            parser.error("give --student FOLDER: there is no space.json here, which a published Space has")
        app = build(choices)
    except VisitorError as error:
        here = "" if Path(arguments.student or "").is_dir() else " There is no folder of that name here either."
        parser.exit(2, f"error: {error}{here}\n")
    # On the Hub the machine's own settings (GRADIO_SERVER_NAME …) say where to listen.
    app.launch(server_port=arguments.port, theme=theme(), css=CSS, ssr_mode=False, footer_links=[])


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    main()
