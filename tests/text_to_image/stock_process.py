"""Run as a script in a new process: what stock diffusers makes of exported students. Nothing of si_distill is imported.

    python stock_process.py FOLDER

FOLDER holds `jobs.json`, a list of students, and gets `images.safetensors`, an image (B, 3, H, W) in [0, 1] for each call.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(sys.argv[1])
PROMPTS = ["a red fox in the snow", "two boats"]


def call(pipeline, latents, steps, student):
    size = {"height": student["height"], "width": student["width"]}
    torch.manual_seed(5)  # of re-noising, which most pipelines draw from the global generator
    arguments = student["arguments"][str(steps)]
    return pipeline(prompt=list(PROMPTS), latents=latents.clone(), output_type="pt", **size, **arguments).images


def scheduler(folder):
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder / "scheduler")


def adapter(job, latents, images):
    """A LoRA on its base: re-noising, alone, fused, at half its effect, and with a second one stacked on it."""
    name, folder = job["name"], ROOT / job["folder"]
    student, renoise = (json.loads((ROOT / job[key] / "student.json").read_text()) for key in ("folder", "renoise"))
    pipeline = getattr(diffusers, student["pipeline_class"]).from_pretrained(student["base"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder, adapter_name="student")
    pipeline.scheduler = scheduler(ROOT / job["renoise"])
    images[f"{name} renoise/4"] = call(pipeline, latents, 4, renoise)
    pipeline.scheduler = scheduler(folder)
    for steps in student["student_steps"]:
        images[f"{name}/{steps}"] = call(pipeline, latents, steps, student)
    pipeline.fuse_lora(adapter_names=["student"])
    images[f"{name}/fused"] = call(pipeline, latents, 1, student)
    pipeline.unfuse_lora()
    images[f"{name}/unfused"] = call(pipeline, latents, 1, student)
    pipeline.set_adapters(["student"], [0.5])
    images[f"{name}/half"] = call(pipeline, latents, 1, student)
    pipeline.load_lora_weights(ROOT / job["stack"], adapter_name="style")
    pipeline.set_adapters(["student", "style"], [1.0, 0.5])
    images[f"{name}/stacked"] = call(pipeline, latents, 1, student)
    pipeline.set_adapters(["student", "style"], [1.0, 0.0])
    images[f"{name}/second off"] = call(pipeline, latents, 1, student)
    pipeline.delete_adapters("style")
    images[f"{name}/second gone"] = call(pipeline, latents, 1, student)
    pipeline.disable_lora()
    images[f"{name}/disabled"] = call(pipeline, latents, 1, student)


def whole(job, latents, images):
    """A student of full weights."""
    folder = ROOT / job["folder"]
    student = json.loads((folder / "student.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == student["pipeline_class"]
    pipeline.set_progress_bar_config(disable=True)
    for steps in student["student_steps"]:
        images[f"{job['name']}/{steps}"] = call(pipeline, latents, steps, student)


def main():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    images = {}
    for job in json.loads((ROOT / "jobs.json").read_text()):
        latents = load_file(ROOT / f"{job['pipeline']}.safetensors")["latents"]
        (whole if job["whole"] else adapter)(job, latents, images)
    assert "si_distill" not in sys.modules
    save_file({name: image.contiguous() for name, image in images.items()}, ROOT / "images.safetensors")


if __name__ == "__main__":
    main()
