"""Diffusers' teachers: the same numbers as diffusers' own formulas and samplers, and students of them."""

import json

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)
from diffusers_models import save_ddpm_pipeline, save_dit_pipeline, save_folders, tiny_dit, tiny_unet
from trainer_builders import distillation

from si_distill import Condition, InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.conversion.diffusers_teachers import convert_diffusers
from si_distill.errors import InputError
from si_distill.loading import load_pipeline

SCHEDULES = {
    "linear": {},
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
}


def noise(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same_noise(pipe, *shape):
    """The noise that diffusers' pipelines draw from seed 0, which is their first state; ours multiply theirs by β(1)."""
    return noise(0, *shape, dtype=torch.float32) / pipe.scheduler.init_noise_sigma


def trailing(steps, scheduler):
    """The steps that diffusers' "trailing" spacing evaluates, as times."""
    scheduler.set_timesteps(steps)
    return (scheduler.timesteps.double() / (scheduler.config.num_train_timesteps - 1)).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_samples_and_noise_are_those_of_diffusers_formulas(schedule, prediction_type, tmp_path):
    scheduler = DDPMScheduler(**SCHEDULES[schedule], prediction_type=prediction_type, clip_sample=False)
    pipe = convert_diffusers(str(save_folders(tmp_path, tiny_dit(out_channels=4), scheduler)))
    network, config = pipe.transformer.double(), pipe.scheduler.config
    steps = torch.tensor([0, 1, 42, 99]) * (config.interpolant_kwargs["num_train_timesteps"] // 100)
    t = steps.double() / (config.interpolant_kwargs["num_train_timesteps"] - 1)
    x_t, labels = noise(0, 4, 2, 8, 8), torch.tensor([0, 2, 3, 1])
    with torch.no_grad():
        output = network(x_t, steps, labels).sample[:, :2]
        x0, x1 = (pipe.field()(x_t, t, Condition(labels), space) for space in ("sample", "epsilon"))
    bar = scheduler.alphas_cumprod[steps].double().reshape(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    expected = {
        "epsilon": lambda: ((x_t - sigma * output) / alpha, output),
        "sample": lambda: (output, (x_t - alpha * output) / sigma),
        "v_prediction": lambda: (alpha * x_t - sigma * output, sigma * x_t + alpha * output),
    }[prediction_type]()
    torch.testing.assert_close(x0, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x1, expected[1], rtol=1e-9, atol=1e-9)
    for k, row in zip(steps.tolist(), range(4), strict=True):  # in the precision of the scheduler's table
        theirs = scheduler.step(output[row : row + 1], k, x_t[row : row + 1]).pred_original_sample
        torch.testing.assert_close(x0[row : row + 1], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ddim_makes_the_images_of_dit_pipeline(tmp_path, guidance_scale):
    theirs = save_dit_pipeline(tmp_path, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    ours = load_pipeline(InterpolantPipeline, "teacher", str(tmp_path))
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    assert ours.get_label_ids(["Carassius auratus", 207]) == [1, 207]
    arguments = dict(guidance_scale=guidance_scale, output_type="np")
    expected = theirs([1, 207], num_inference_steps=5, generator=torch.Generator().manual_seed(0), **arguments).images
    timesteps = trailing(5, theirs.scheduler)
    arguments |= dict(timesteps=timesteps, latents=same_noise(ours, 2, 4, 8, 8))
    made = ours([1, 207], **arguments).images
    assert made.shape == (2, 8, 8, 3)
    assert abs(made - expected).max() < 1e-5
    euler = ours([1, 207], solver="euler", **arguments)
    assert abs(euler.images - expected).max() > 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_makes_the_images_of_ddim_pipeline(tmp_path, prediction_type):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=prediction_type)
    theirs = DDIMPipeline(tiny_unet(), scheduler)
    theirs.save_pretrained(tmp_path)
    ours = convert_diffusers(str(tmp_path))
    arguments = dict(batch_size=3, output_type="np")
    expected = theirs(num_inference_steps=4, generator=torch.Generator().manual_seed(0), **arguments).images
    timesteps = trailing(4, theirs.scheduler)
    made = ours(timesteps=timesteps, latents=same_noise(ours, 3, 2, 8, 8), **arguments).images
    assert abs(made - expected).max() < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_makes_the_images_of_diffusers_own_loop(tmp_path, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    network = tiny_unet(num_class_embeds=3)
    ours = convert_diffusers(str(save_folders(tmp_path, network, scheduler)))
    x, labels = noise(0, 2, 2, 8, 8, dtype=torch.float32), torch.tensor([0, 2])
    made = ours(labels, num_inference_steps=4, latents=x, output_type="latent").images
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # as diffusers' flow pipelines space them, before the shift
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, labels).sample, t, x).prev_sample
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)


def test_a_saved_ddpm_pipeline_with_a_flow_matching_scheduler_is_a_teacher(tmp_path):
    save_ddpm_pipeline(tmp_path / "flow", FlowMatchEulerDiscreteScheduler(), in_channels=1, out_channels=1)
    trainer = distillation(tmp_path / "flow", tmp_path / "run", "--max_steps", 2, "--eval_steps", 2)
    trainer.train()
    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert (student.scheduler.config.interpolant, student.scheduler.config.timestep_scale) == ("linear", 1000.0)
    x = noise(0, 1, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = x - student.transformer(x, torch.tensor([1000.0])).sample
    torch.testing.assert_close(student(latents=x, output_type="latent").images, expected)


def test_one_step_from_the_last_step_is_the_prediction_of_the_sample(tmp_path):
    theirs = save_ddpm_pipeline(tmp_path)
    ours = convert_diffusers(str(tmp_path))
    x = noise(0, 2, 2, 8, 8, dtype=torch.float32)
    made = ours(batch_size=2, num_inference_steps=1, latents=x, output_type="latent").images
    bar = theirs.scheduler.alphas_cumprod[-1].double()
    with torch.no_grad():
        x_t = (1 - bar).sqrt().float() * x
        expected = (x_t.double() - (1 - bar).sqrt() * theirs.unet(x_t, 999).sample.double()) / bar.sqrt()
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-3)  # x̂0 is up to 157 times the noise


def test_folders_of_every_layout_open(tmp_path):
    """A pipeline, the component inside it, and the layout of the first published folders, all files in one."""
    pipe = save_ddpm_pipeline(tmp_path / "pipeline")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "pipeline").glob("*/*"):
        (flat / file.name).write_bytes(file.read_bytes())
    (flat / "model_index.json").write_bytes((tmp_path / "pipeline" / "model_index.json").read_bytes())
    for source in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet", flat):
        opened = load_pipeline(InterpolantPipeline, "teacher", str(source))
        for ours, theirs in zip(opened.transformer.parameters(), pipe.unet.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert opened.scheduler.config.timestep_type == "discrete"


def test_old_folders_that_call_a_dit_a_transformer_open(tmp_path):
    """A class that diffusers has renamed, and weights from before safetensors."""
    network = save_dit_pipeline(tmp_path).transformer
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(tmp_path / "transformer", safe_serialization=False)
    edit(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    for source in (tmp_path, tmp_path / "transformer"):
        teacher = convert_diffusers(str(source))
        assert type(teacher.transformer).__name__ == "DiTTransformer2DModel"
        assert teacher.network.null_class == 1000
        teacher.save_pretrained(tmp_path / "ours")
        assert type(InterpolantPipeline.from_pretrained(tmp_path / "ours").transformer) is type(teacher.transformer)


def digits_teacher(tmp_path, kind):
    return {
        "dit": lambda: save_folders(tmp_path, tiny_dit(in_channels=1, out_channels=2, num_embeds_ada_norm=10)),
        "unet": lambda: save_folders(tmp_path, tiny_unet(in_channels=1, out_channels=1)),
        "unet with classes": lambda: save_folders(
            tmp_path, tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
        ),
    }[kind]()


@pytest.mark.parametrize("adversarial", ["encoder", "head"])
@pytest.mark.parametrize("kind", ["dit", "unet", "unet with classes"])
def test_students_are_distilled_saved_and_loaded(kind, adversarial, tmp_path, remote_code_cache):
    teacher = digits_teacher(tmp_path, kind)
    extra = ["--adversarial.kind", adversarial, "--max_steps", 10, "--eval_steps", 10, "--learning_rate", "1e-3"]
    trainer = distillation(teacher, tmp_path / "run", *extra)
    trainer.train()
    assert (tmp_path / "run" / "samples" / "step_00000010.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert all(line["generator_adversarial_loss"] > 0 and line["critic_loss"] > 0 for line in lines)

    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert type(student.transformer) is type(trainer.teacher_pipeline.transformer)
    step = student.scheduler.config.init_time * 999
    assert step == pytest.approx(round(step), abs=1e-9)
    trusted = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)
    what = {"class_labels": [3, 5]} if student.network.num_classes else {"batch_size": 2}
    images = [
        pipe(**what, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for pipe in (student, trusted)
    ]
    assert torch.equal(*images)
    assert torch.isfinite(images[0]).all()
    assert images[0].shape == (2, 1, 8, 8)


def test_a_guided_latent_dit_is_distilled(tmp_path):
    save_dit_pipeline(tmp_path / "dit")
    extra = ["--guidance_scale", 4, "--critic_class_dropout_prob", 0.1, "--critic_guidance_scale", 1.5]
    trainer = distillation(tmp_path / "dit", tmp_path / "run", *extra, "--max_steps", 10, "--eval_steps", 10)
    assert int(trainer.null.labels) == 1000
    trainer.train()
    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "run")
    assert student("golden retriever", output_type="pt").images.shape == (1, 3, 8, 8)
    assert student.vae.config.scaling_factor == 0.3


def test_an_unconditional_teacher_cannot_be_guided(tmp_path):
    save_ddpm_pipeline(tmp_path / "ddpm")
    with pytest.raises(InputError, match="need a null class, but the teacher was trained"):
        distillation(tmp_path / "ddpm", tmp_path / "run", "--guidance_scale", 2)
    with pytest.raises(ValueError, match="has no null class to guide with"):
        convert_diffusers(str(tmp_path / "ddpm"))(guidance_scale=2.0)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_short(folder):
    file = folder / "network" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def scheduler_of(scheduler):
    return lambda folder: scheduler.save_pretrained(folder / "scheduler")


BROKEN = {
    "no scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        "no .*scheduler_config.json next to it",
    ),
    "weights cut short": (cut_short, "Unable to load weights"),
    "no betas": (
        scheduler_of(ScoreSdeVeScheduler()),
        "ScoreSdeVeScheduler, has no beta schedule",
    ),
    "sigmas upside down": (scheduler_of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "invert_sigmas=True"),
    "sigmoid betas": (scheduler_of(DDPMScheduler(beta_schedule="sigmoid")), "Unknown `beta_schedule` 'sigmoid'"),
    "zero terminal SNR": (
        scheduler_of(DDIMScheduler(rescale_betas_zero_snr=True)),
        r"at step \d+ it has alphas_cumprod .*'rescale_betas_zero_snr': True",
    ),
    "betas of its own": (
        scheduler_of(DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])),
        r"at step 0 it has alphas_cumprod 0.9 instead of .*'trained_betas': \[0.1",
    ),
    "another prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"),
        "prediction_type='flow_prediction'; known are epsilon, sample, v_prediction",
    ),
    "channels": (lambda f: tiny_unet(out_channels=5).save_pretrained(f / "network"), "takes 2 channels and gives 5"),
    "no size": (lambda f: tiny_unet(sample_size=None).save_pretrained(f / "network"), "no `sample_size` in its config"),
    "other labels": (
        lambda f: tiny_unet(class_embed_type="timestep").save_pretrained(f / "network"),
        "class_embed_type='timestep'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_teacher_that_cannot_be_used_says_why(case, tmp_path):
    damage, message = BROKEN[case]
    source = save_folders(tmp_path, tiny_unet())
    damage(tmp_path)
    with pytest.raises(InputError, match=f"(?s)Cannot use the UNet2DModel '{source}' as a teacher: .*{message}"):
        convert_diffusers(str(source))


def test_other_schedulers_of_the_same_noise_levels_are_as_good(tmp_path):
    source = save_folders(tmp_path, tiny_unet(), EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    config = convert_diffusers(str(source)).scheduler.config
    assert config.interpolant_kwargs["beta_schedule"] == "scaled_linear"


def test_pipelines_of_other_kinds_are_named(tmp_path):
    ScoreSdeVePipeline(tiny_unet(), ScoreSdeVeScheduler()).save_pretrained(tmp_path / "sde")
    with pytest.raises(
        InputError, match=r"saved as ScoreSdeVePipeline, .* Teachers are InterpolantPipeline folders.*DiTPipeline"
    ):
        load_pipeline(InterpolantPipeline, "teacher", str(tmp_path / "sde"))
    with pytest.raises(InputError, match="nothing that diffusers knows"):
        convert_diffusers(str(tmp_path))
