"""Exported students in stock diffusers, in a process of its own that knows nothing of si_distill."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exported_students import disturbed, student_scheduler, text_settings
from safetensors.torch import load_file, save_file
from tiny_pipelines import ALL, build

from si_distill.errors import InputError
from si_distill.pipelines import Field
from si_distill.sample_noise import SampleNoise
from si_distill.text_to_image.lora import LORA_WEIGHTS
from si_distill.text_to_image.student import STUDENT, TextToImageStudent, load_student
from si_distill.text_to_image.teacher import TextToImageTeacher
from si_distill.text_to_image.texts import encode_texts
from si_distill.training.distillation.levels import Level, Levels

HERE = Path(__file__).parent
PROMPTS = ["a red fox in the snow", "two boats"]
#: Of images in [0, 1]; 1e-5 was seen. The same operations in the same precision: what is left is the order of additions.
TOLERANCE = 5e-5


def shown(teacher, latents):
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def our_images(teacher, network, scheduler, texts, x1):
    """The images of all numbers of steps: where the trainer's levels stand before the last step, and that step."""
    field = Field(lambda x, t, c: network(x, t, guidance=c.guidance, **c.text), scheduler)
    condition, images = texts.condition(torch.arange(2)), {}
    for count in scheduler.config.student_steps:
        level = Level(count, count - 1)
        x_t, t = Levels(scheduler, 0).state(field, x1, level, condition, SampleNoise(0), (0,), range(2))
        images[str(count)] = shown(teacher, field.sample(x_t, t, condition))
    return images


@torch.no_grad()
def renoised_images(teacher, network, scheduler, texts, x1):
    """Four re-noising steps, with the noise that a stock call draws."""
    field = Field(lambda x, t, c: network(x, t, guidance=c.guidance, **c.text), scheduler)
    condition, pipeline = texts.condition(torch.arange(2)), teacher.pipeline
    torch.manual_seed(5)
    scheduler.set_timesteps(4)
    x_t = x1 * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = torch.randn_like(pipeline._pack_latents(x1, *x1.shape) if teacher.convention.packed else x1)
        if teacher.convention.packed:
            height, width = teacher.size
            noise = pipeline._unpack_latents(noise, height, width, pipeline.vae_scale_factor).view_as(x1)
        x_t = scheduler.step(field.predict(x_t, t, condition), t, x_t, variance_noise=noise, return_dict=False)[0]
    return shown(teacher, x_t)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(images of stock calls, our images), each by the names of calls, and the folder."""
    root = tmp_path_factory.mktemp("students")
    ours, jobs = {}, []
    for name in ALL:
        pipeline = build(name)
        pipeline.save_pretrained(root / name)
        told = text_settings(name)
        texts = encode_texts(pipeline, PROMPTS, told.max_length, told_guidance=told.told_guidance)
        teacher = TextToImageTeacher(pipeline, (32, 32), lora_rank=4)
        x1 = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
        latents = pipeline._pack_latents(x1, *x1.shape) if teacher.convention.packed else x1
        save_file({"latents": latents.contiguous()}, root / f"{name}.safetensors")
        student, style = (disturbed(copy.deepcopy(teacher.transformer), seed) for seed in (1, 2))
        # Shifted levels where the path has them; a number of steps whose times on SD's grid are no stock scheduler's.
        plain = student_scheduler(teacher, timestep_shift=1.0 if name in ("sd15", "sdxl") else 3.0)
        renoise = student_scheduler(teacher, solver="renoise", student_steps=[4])
        for folder, network, steps in (
            (f"{name}-lora", student, plain),
            (f"{name}-style", style, plain),
            (f"{name}-renoise", student, renoise),
        ):
            TextToImageStudent(teacher, network, steps, str(root / name), told).save_pretrained(root / folder)
        ours |= {f"{name}/{key}": value for key, value in our_images(teacher, student, plain, texts, x1).items()}
        ours[f"{name} renoise/4"] = renoised_images(teacher, student, renoise, texts, x1)
        once = student_scheduler(teacher, student_steps=[1])
        ours[f"{name}/base"] = our_images(teacher, teacher.transformer, once, texts, x1)["1"]
        folders = {"folder": f"{name}-lora", "stack": f"{name}-style", "renoise": f"{name}-renoise"}
        jobs.append({"name": name, "pipeline": name, "whole": False, **folders})
        teacher = TextToImageTeacher(build(name), (32, 32))
        before = dict(teacher.pipeline.components), dict(teacher.pipeline.config)
        student = disturbed(copy.deepcopy(teacher.transformer), 1)
        full = TextToImageStudent(teacher, student, plain, str(root / name), told)
        full.save_pretrained(root / f"{name}-full")
        assert dict(teacher.pipeline.components) == before[0]
        assert dict(teacher.pipeline.config) == before[1]
        ours |= {f"{name} full/{key}": value for key, value in our_images(teacher, student, plain, texts, x1).items()}
        jobs.append({"name": f"{name} full", "pipeline": name, "folder": f"{name}-full", "whole": True})
    (root / "jobs.json").write_text(json.dumps(jobs))
    run = subprocess.run([sys.executable, HERE / "stock_process.py", root], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return SimpleNamespace(theirs=load_file(root / "images.safetensors"), ours=ours, root=root)


def assert_images(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["", " full"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stock_call_makes_the_image_of_training(exported, name, kind, steps):
    assert_images(exported.theirs[f"{name}{kind}/{steps}"], exported.ours[f"{name}{kind}/{steps}"])
    assert (exported.ours[f"{name}{kind}/{steps}"] - exported.ours[f"{name}/base"]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_a_stock_call_noises_again_as_in_training(exported, name):
    # Stable Diffusion's LCMScheduler starts from x1, training from 0.9977 x1.
    tolerance = 5e-3 if name in ("sd15", "sdxl") else TOLERANCE
    theirs, ours = exported.theirs[f"{name} renoise/4"], exported.ours[f"{name} renoise/4"]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)
    assert (ours - exported.ours[f"{name}/4"]).abs().max() > 10 * tolerance


@pytest.mark.parametrize("name", ALL)
def test_a_second_adapter_fusion_and_scales_leave_the_student_as_it_was(exported, name):
    theirs, ours = exported.theirs, exported.ours
    for call in ("fused", "unfused", "second off", "second gone"):
        assert_images(theirs[f"{name}/{call}"], ours[f"{name}/1"])
    assert_images(theirs[f"{name}/disabled"], ours[f"{name}/base"])
    for call in ("half", "stacked"):
        for other in (f"{name}/1", f"{name}/base"):
            assert (theirs[f"{name}/{call}"] - ours[other]).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["sana", "flux", "sd15"])
@pytest.mark.parametrize("kind", ["renoise", "full"])
def test_images_depend_on_their_generators_alone(exported, name, kind):
    student = load_student(exported.root / f"{name}-{kind}")
    assert student.trained_steps == ([4] if kind == "renoise" else [1, 4])

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = student.images(PROMPTS, generators=generators(0, 1))
    (alone,) = student.images(PROMPTS[1:], generators=generators(1))
    assert both[1].size == (32, 32)
    difference = np.abs(np.asarray(both[1], int) - np.asarray(alone, int))
    assert difference.max() <= 1  # of 255: rounding
    assert student.images(PROMPTS[:1], generators=generators(0), height=64, width=32)[0].size == (32, 64)


def test_a_student_says_how_it_is_called(exported):
    def arguments(folder):
        return json.loads((exported.root / folder / STUDENT).read_text())["arguments"]["4"]

    even = {"num_inference_steps": 4, "sigmas": [1.0, 0.75, 0.5, 0.25]}
    length = {"max_sequence_length": 64}
    assert arguments("sd3-lora") == {**even, "guidance_scale": 1.0, **length}
    assert arguments("sana-lora") == {**even, "guidance_scale": 1.0, "use_resolution_binning": False, **length}
    assert arguments("flux-lora") == {"num_inference_steps": 4, "guidance_scale": 3.5, **length}
    assert arguments("qwen-lora") == {"num_inference_steps": 4, "true_cfg_scale": 1.0, **length}
    assert arguments("z_image-lora") == {"num_inference_steps": 4, "guidance_scale": 0.0, **length}
    unet = {"num_inference_steps": 4, "timesteps": [999, 749, 500, 250], "guidance_scale": 1.0}
    assert arguments("sd15-lora") == unet
    files = sorted(path.name for path in (exported.root / "sd3-lora").rglob("*") if path.is_file())
    assert files == [LORA_WEIGHTS, "scheduler_config.json", STUDENT]
    assert all(value.dtype == torch.float32 for value in load_file(exported.root / "sd3-lora" / LORA_WEIGHTS).values())


def test_a_start_below_pure_noise(exported):
    teacher = TextToImageTeacher(build("sd3"), (32, 32), lora_rank=2)
    student = copy.deepcopy(teacher.transformer)
    with pytest.raises(InputError, match=r"`init_time` is 0.6, but the stock pipelines start at pure noise"):
        TextToImageStudent(teacher, student, student_scheduler(teacher, init_time=0.6), "base", text_settings("sd3"))


def test_one_step_below_pure_noise_of_a_unet(exported):
    """SiD-LSG's students start at step 625: no other scheduler of diffusers starts there from as much noise."""
    teacher = TextToImageTeacher(build("sd15"), (32, 32))
    student, told = disturbed(copy.deepcopy(teacher.transformer), 1), text_settings("sd15")
    texts = encode_texts(teacher.pipeline, PROMPTS)
    steps = student_scheduler(teacher, init_time=625 / 999, student_steps=[1])
    x1 = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    TextToImageStudent(teacher, student, steps, "base", told).save_pretrained(exported.root / "sd15-low")
    loaded = load_student(exported.root / "sd15-low")
    assert loaded.arguments()["timesteps"] == [625]
    theirs = loaded.pipeline(PROMPTS, latents=x1, output_type="pt", **loaded.arguments()).images
    assert_images(theirs, our_images(teacher, student, steps, texts, x1)["1"])


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of sd3's adapter that a test may change, and a function that changes its student.json."""
    folder = shutil.copytree(exported.root / "sd3-lora", tmp_path / "student")

    def change(**values):
        record = json.loads((folder / STUDENT).read_text()) | values
        (folder / STUDENT).write_text(json.dumps(record))

    return folder, change


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"base": "/nowhere/else"},
            "an adapter of the StableDiffusion3Pipeline '/nowhere/else', which cannot be loaded",
        ),
        ({"pipeline_class": "FluxPipeline"}, "of a FluxPipeline, but .* is a StableDiffusion3Pipeline"),
        ({"pipeline_class": "os"}, "names the pipeline class 'os', which is none of those known here"),
        ({"student_steps": [1, 2]}, r"arguments for each of its `student_steps` \[1, 2\]; it has them for 1, 4"),
        ({"arguments": {"1": {"num_inference_steps": "1"}}}, "must be a whole number, got '1'"),
        (
            {"student_steps": [1], "arguments": {"1": {"num_inference_steps": 1, "output_type": 1}}},
            "the argument 'output_type'",
        ),
        ({"height": "32"}, "`?height`? must be a whole number"),
    ],
)
def test_a_damaged_or_foreign_record(copied, values, said):
    folder, change = copied
    change(**values)
    with pytest.raises(InputError, match=said):
        load_student(folder)


def test_what_cannot_be_loaded(copied, exported):
    folder, change = copied
    change(base="/nowhere/else")
    student = load_student(folder, base=str(exported.root / "sd3"))
    with pytest.raises(InputError, match="There is an adapter called 'student' already"):
        student.add_lora(str(exported.root / "sd3-style"), "student")
    student.add_lora(str(exported.root / "sd3-style"), "style", 0.5)
    assert student.pipeline.get_active_adapters() == ["student", "style"]
    with pytest.raises(InputError, match="There is an adapter called 'style' already"):
        student.add_lora(str(exported.root / "sd3-style"), "style")
    with pytest.raises(InputError, match="`num_inference_steps` is 2, but this student has 1, 4 steps"):
        student.images(PROMPTS, steps=2)
    with pytest.raises(InputError, match="multiples of"):
        student.images(PROMPTS, height=33)
    (folder / STUDENT).write_text("{")
    with pytest.raises(InputError, match=r"student\.json"):
        load_student(folder)
    (folder / STUDENT).unlink()
    with pytest.raises(InputError, match="is no text-to-image student"):
        load_student(folder)


def test_weights_of_another_network(copied, exported):
    folder, _ = copied
    shutil.copyfile(exported.root / "flux-lora" / LORA_WEIGHTS, folder / LORA_WEIGHTS)
    with pytest.raises(InputError, match=r"The adapter .* does not fit"):
        load_student(folder)
    (folder / LORA_WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"The adapter .* does not fit"):
        load_student(folder)
