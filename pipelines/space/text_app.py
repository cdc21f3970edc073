"""Draws what a visitor writes, in the steps that a student was trained for: a Gradio app, as a Space or on your machine.

    python pipelines/space/text_app.py --student runs/sd35-turbo

As a Space it shows the student of space.json, which `pipelines/publish.py --space` writes.
"""

import argparse
import html
import os
from collections.abc import Callable
from pathlib import Path

try:
    import spaces  # ZeroGPU: before torch
except ImportError:
    spaces = None

import gradio as gr
from text_students import MAX_IMAGES, MAX_PROMPT, MAX_SEED, Result, TextStudent, VisitorError, configured

from si_distill.errors import InputError

HERE = Path(__file__).parent


def on_gpu(function: Callable) -> Callable:
    """Borrows a GPU for the call where the Space has ZeroGPU; elsewhere the function itself."""
    return spaces.GPU(duration=60)(function) if spaces else function


def build(student: TextStudent) -> gr.Blocks:
    """The app for a student."""

    @on_gpu
    def draw(prompt: str, count: float, seed: float, steps: float) -> Result:
        return student.draw(prompt, count, seed, steps)

    def generate(prompt, count, seed, steps):
        try:
            result = draw(prompt, count, seed, steps)
        except (VisitorError, InputError) as error:
            raise gr.Error(html.escape(str(error)), duration=8, print_exception=False) from error
        evaluations = "1 evaluation" if result.steps == 1 else f"{result.steps} evaluations"
        return result.images, f"{evaluations} of the network for each image; **{result.seconds:.2f} s** for all."

    steps = student.steps
    with gr.Blocks(title="Few steps", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"# {html.escape(student.name)}\nA text-to-image student of {' or '.join(map(str, steps))} steps.")
        prompt = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, lines=2, elem_id="prompt")
        with gr.Row():
            count = gr.Slider(1, MAX_IMAGES, value=1, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            choice = gr.Radio(steps, value=steps[-1], label="Steps")
        button = gr.Button("Generate", variant="primary", elem_id="generate")
        pictures = gr.Gallery(label="Images", format="png", columns=2, elem_id="pictures")
        note = gr.Markdown()
        gr.on(
            [button.click, prompt.submit],
            generate,
            [prompt, count, seed, choice],
            [pictures, note],
            api_name="generate",
            concurrency_limit=1,
        )
    return app.queue(max_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="a folder, or a repository of the Hub; without it, that of space.json")
    parser.add_argument("--base", help="the stock pipeline that it changes, if that has moved")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    arguments = parser.parse_args()
    try:
        if arguments.student:
            student = TextStudent(arguments.student, base=arguments.base)
        elif (HERE / "space.json").is_file():
            student = configured(HERE / "space.json")
        else:
            parser.error("give --student FOLDER: there is no space.json here, which a published Space has")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    # On the Hub the machine's own settings (GRADIO_SERVER_NAME …) say where to listen.
    build(student).launch(server_port=arguments.port, ssr_mode=False, footer_links=[])


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    main()
