"""Teachers and students on latents that were encoded once."""

import pytest
import torch
from helpers import tiny_edm2, tiny_sit
from latent_caches import precompute, tiny_autoencoder
from safetensors.torch import load_file
from script_runs import ROOT, metrics
from trainer_builders import distillation, teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.dry_run.report import dry_run

GREY = dict(in_channels=1, out_channels=1)
MODEL = "{patch_size: 2, num_layers: 2, num_attention_heads: 2, attention_head_dim: 8}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    vae = tmp_path_factory.mktemp("vae")
    tiny_autoencoder(**GREY).save_pretrained(vae)
    return precompute(vae, tmp_path_factory.mktemp("latents") / "cache")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """On latents of 4 × 4 × 4 of digits."""
    folder = tmp_path_factory.mktemp("teacher")
    network = tiny_sit(sample_size=4, patch_size=2, in_channels=4, num_classes=10)
    InterpolantPipeline(network, StochasticInterpolantScheduler(), tiny_autoencoder(**GREY)).save_pretrained(folder)
    return folder


def test_x0_is_a_function_of_the_step_and_flips_choose_the_side(cache, tmp_path):
    arguments = ["--data.name", str(cache), "--per_device_train_batch_size", 8, "--model", MODEL]
    plain, flips, later = (
        teaching(tmp_path / name, *arguments, "--data.random_flip", flip)
        for name, flip in (("plain", "false"), ("flips", "true"), ("later", "true"))
    )
    mirrored = []
    for step in range(3):
        plain.step = flips.step = step
        straight, batch = (trainer.next_batch(trainer.data, 0) for trainer in (plain, flips))
        moments = next(plain.data.batches(8, seed=0, start=step))
        noise = plain.noise.normal((4, 4, 4), "latents", step, indices=range(8))
        sides = [
            plain.data.scaling.encode(moments["latents_mean"][:, n] + moments["latents_std"][:, n] * noise)
            for n in (0, 1)
        ]
        torch.testing.assert_close(straight["images"], sides[0])
        as_it_is, mirror = ((batch["images"] - side).abs().amax((1, 2, 3)) < 1e-6 for side in sides)
        assert (as_it_is ^ mirror).all()
        assert torch.equal(batch["labels"], straight["labels"])
        mirrored += mirror.tolist()
    assert 0.2 < sum(mirrored) / len(mirrored) < 0.8
    later.step = 2
    assert torch.equal(later.next_batch(later.data, 0)["images"], batch["images"])


def test_a_teacher_of_latents_is_a_whole_pipeline(cache, tmp_path):
    trainer = teaching(tmp_path / "run", "--data.name", str(cache), "--model", MODEL, "--max_steps", 2)
    trainer.train()
    pipeline = InterpolantPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.vae.config.scaling_factor == 0.3
    assert pipeline([3], num_inference_steps=2).images[0].size == (8, 8)
    assert pipeline.config.id2label[3] == "3"
    assert [step for (step,) in metrics(tmp_path / "run")] == [1, 2]


def test_distillation_with_real_latents_resumes_bit_for_bit(cache, teacher, tmp_path):
    arguments = ["--data.name", cache, "--data.random_flip", "true", "--objective", "realuid", "--critic_steps", 2]
    arguments += ["--adversarial.kind", "encoder"]
    distillation(teacher, tmp_path / "whole", *arguments, "--max_steps", 4).train()
    distillation(teacher, tmp_path / "cut", *arguments, "--max_steps", 2).train()
    latest = ["--resume_from_checkpoint", "latest"]
    distillation(teacher, tmp_path / "cut", *arguments, "--max_steps", 4, *latest).train()
    names = ("critic_loss", "generator_loss", "critic_adversarial_loss")
    assert metrics(tmp_path / "cut", *names) == metrics(tmp_path / "whole", *names)
    assert len(metrics(tmp_path / "cut")) == 4
    file = "transformer/diffusion_pytorch_model.safetensors"
    whole, cut = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    images = OneStepInterpolantPipeline.from_pretrained(tmp_path / "cut")([1, 2]).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_sida_on_edm2_reads_latents_in_edm2s_scaling(tmp_path):
    """The recipe over a teacher of EDM2's kind: latents of images in [0, 1], a mean and a deviation for each channel."""
    statistics = dict(latents_mean=[1.0, -1.0, 0.5, 0.0], latents_std=[2.0, 1.0, 0.5, 1.5], scaling_factor=0.5)
    vae, network = tiny_autoencoder(**GREY, **statistics), tiny_edm2(sample_size=4, num_classes=10)
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    InterpolantPipeline(network, scheduler, vae, vae_pixel_min=0.0).save_pretrained(tmp_path / "teacher")
    latents = precompute(tmp_path / "teacher", tmp_path / "latents")
    recipe = ["--config", ROOT / "configs/bases/sid_edm2.yaml", "--config", ROOT / "configs/recipes/sida_edm2.yaml"]
    small = ["--data.name", latents, "--data.image_size", 8, "--max_steps", 1, "--generator_start_images", 0]
    small += ["--adversarial.start_images", 0, "--mixed_precision", "no"]
    trainer = distillation(tmp_path / "teacher", tmp_path / "run", *recipe, *small)
    real = trainer.next_batch(trainer.data, 0)["images"]
    item = next(trainer.data.batches(4))["latents_mean"][:, 0]
    mean, std = (torch.tensor(statistics[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    deviation = next(trainer.data.batches(4))["latents_std"][:, 0]
    noise = trainer.noise.normal((4, 4, 4), "latents", 0, indices=range(4))
    torch.testing.assert_close(real, (item + deviation * noise - mean) / std * 0.5)
    metrics, finite = trainer.iteration()
    assert finite
    assert metrics["generator_adversarial_loss"].isfinite()


def test_latents_that_are_not_the_teachers_are_refused(cache, teacher, teacher_folder, tmp_path):
    other = tmp_path / "other"
    network = tiny_sit(sample_size=4, patch_size=2, in_channels=4, num_classes=10)
    InterpolantPipeline(network, StochasticInterpolantScheduler(), tiny_autoencoder(seed=1, **GREY)).save_pretrained(
        other
    )
    for folder, name, words in (
        (other, cache, r"made with another VAE, .* than that of the teacher"),
        (teacher, "digits", "Encode them first: si-distill precompute-latents --vae"),
        (teacher_folder, cache, "has no autoencoder to say whether they are its own"),
    ):
        with pytest.raises(InputError, match=words):
            distillation(folder, tmp_path / "run", "--data.name", name, "--objective", "realuid")
    with pytest.raises(InputError, match="holds latents, which cannot be flipped or moved"):
        teaching(tmp_path / "run", "--data.name", str(cache), "--augment_prob", "0.1")
    assert not (tmp_path / "run").exists()


def test_a_best_model_is_measured_against_the_images_behind_the_latents(cache, teacher, tmp_path):
    arguments = ["--data.name", cache, "--max_steps", 1, "--eval_metric_steps", 1, "--evaluation.num_samples", 8]
    distillation(teacher, tmp_path / "run", *arguments, "--objective", "sid").train()
    assert (tmp_path / "run" / "best" / "evaluation.json").is_file()


def test_a_dry_run_reads_the_manifest(cache, tmp_path):
    argv = ["--output_dir", tmp_path / "run", "--data.name", cache, "--model", MODEL]
    text = dry_run(parse_settings(TeacherConfig, list(map(str, argv))))
    assert "4 × 4 × 4, 10 classes" in text
    assert f"{cache}: 50 latents of digits, split train, 8 × 8 pixels" in text
    assert "autoencoder " in text
