"""Checkpoints of EDM, EDM2, SiD and SiDA, written in their structure, become pipelines that compute the same."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from edm_pickles import Persistent, edm2_preconditioning, edm_preconditioning, write
from helpers import field_on, tiny_edm, tiny_edm2
from safetensors.torch import load_file
from test_trainers import distillation

from si_distill import Condition, InterpolantPipeline, OneStepInterpolantPipeline, get_interpolant
from si_distill.conversion.config import ConvertConfig
from si_distill.conversion.convert import convert_checkpoint
from si_distill.conversion.edm import convert_edm
from si_distill.errors import InputError
from si_distill.hub.staging import stage_model
from si_distill.settings import parse_settings


def pipeline(path, kind, **settings):
    return convert_edm(ConvertConfig(source=str(path), out="unused", kind=kind, **settings)).pipeline()


SIGMAS = (0.002, 0.3, 2.5, 80.0)


def adm(**config):
    return tiny_edm("adm", **{"model_channels": 64, "attention_head_dim": 64, "channel_mult": [1, 1], **config})


NETWORKS = {
    "ddpmpp": lambda **config: tiny_edm("ddpmpp", augment_dim=9, **config),
    "ncsnpp": lambda **config: tiny_edm("ncsnpp", num_classes=0, augment_dim=9, **config),
    "adm": lambda **config: adm(augment_dim=0, class_dropout_prob=0.1, **config),
    "edm2": tiny_edm2,
}


def preconditioning(kind, network, **changes):
    return (edm2_preconditioning if kind == "edm2" else edm_preconditioning)(network, **changes)


def denoised(network, x, sigma, labels):
    """D(x; σ) of EDM (Karras et al. 2022, eq. 7 and table 1), in float64."""
    sigma = sigma.view(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    c_in, c_noise = 1 / (sigma**2 + 0.25).sqrt(), sigma.flatten().log() / 4
    return c_skip * x + c_out * network(c_in * x, c_noise, labels).sample


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_teacher_denoises_as_its_checkpoint(kind, tmp_path):
    network = NETWORKS[kind]()
    path = write(tmp_path / "net.pkl", {"ema": preconditioning(kind, network), "loss_fn": Persistent("EDMLoss")})
    pipe = pipeline(path, "auto")
    assert type(pipe) is InterpolantPipeline
    assert {name: network.config[name] for name in network.config if name[0] != "_"} == {
        name: value for name, value in pipe.transformer.config.items() if name[0] != "_"
    }
    config = pipe.scheduler.config
    assert config.interpolant_kwargs == {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}
    assert (config.interpolant, config.prediction_type, config.timestep_type) == ("edm", "edm", "log_sigma")

    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    noisy = sigma.view(-1, 1, 1, 1) * torch.randn(
        4, *pipe.network.sample_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    labels = torch.tensor([0, 2, 1, 0])
    interpolant, converted = pipe.scheduler.interpolant, pipe.transformer.double()
    field = field_on(interpolant, converted, "edm", config.timestep_type)
    found = field(noisy, interpolant.times_of_ratios(sigma), Condition(labels), "sample")
    # The paths' time is float64 here; EDM's networks embed ¼ ln σ in float32.
    torch.testing.assert_close(found, denoised(network.double(), noisy, sigma, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_student_maps_noise_in_one_step(kind, tmp_path):
    network = NETWORKS[kind]()
    path = write(tmp_path / "net.pkl", {"ema": preconditioning(kind, network)})
    pipe = pipeline(path, "sid", init_sigma=1.7)
    assert type(pipe) is OneStepInterpolantPipeline
    noise = torch.randn(3, *pipe.network.sample_shape, generator=torch.Generator().manual_seed(0))
    labels = [0, 2, 1] if pipe.network.num_classes else None
    images = pipe(labels, batch_size=None if labels else 3, latents=noise, output_type="latent").images
    with torch.no_grad():
        expected = denoised(
            network, 1.7 * noise, torch.full((3,), 1.7), None if labels is None else torch.tensor(labels)
        )
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert pipeline(path, "sid").scheduler.init_noise_sigma == pytest.approx(2.5, rel=1e-6)

    pipe.save_pretrained(tmp_path / "folder")
    for cls, trust in ((DiffusionPipeline, {"trust_remote_code": True}), (OneStepInterpolantPipeline, {})):
        loaded = cls.from_pretrained(tmp_path / "folder", **trust)
        again = loaded(labels, batch_size=None if labels else 3, latents=noise, output_type="latent").images
        assert torch.equal(again, images)


def test_half_precision_becomes_single(tmp_path):
    network = tiny_edm2().half()
    pipe = pipeline(write(tmp_path / "net.pkl", {"ema": edm2_preconditioning(network)}), "edm")
    assert pipe.transformer.dtype == torch.float32
    for name, value in network.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value.float())


def test_edm2s_log_variance_is_kept_beside_the_teacher_and_starts_a_critic(tmp_path, capsys):
    network = tiny_edm2(in_channels=1, num_classes=10)
    source = write(tmp_path / "net.pkl", {"ema": edm2_preconditioning(network), "loss_fn": Persistent("EDM2Loss")})
    convert_checkpoint(ConvertConfig(source=str(source), out=str(tmp_path / "teacher")))
    assert "the log-variance, for critics with critic_log_variance" in capsys.readouterr().out
    kept = load_file(tmp_path / "teacher" / "log_variance.safetensors")
    assert kept.keys() == {"freqs", "phases", "weight"}
    trainer = distillation(tmp_path / "teacher", tmp_path / "run", "--critic_log_variance", "true")
    level = torch.tensor([-1.0, 0.5])
    # EDM2's forward: logvar_linear(logvar_fourier(c_noise)), whose weight vector (2, 2, 2, 2) has unit norm: ½ each.
    expected = 2**0.5 * torch.cos(level[:, None] * torch.arange(4.0) + 1).sum(1) / 2
    torch.testing.assert_close(trainer.critic.unwrapped.log_variance(level).detach(), expected, rtol=1e-3, atol=1e-4)
    # It is published with the teacher.
    stage_model(
        InterpolantPipeline.from_pretrained(tmp_path / "teacher"), tmp_path / "staged", "u/t", tmp_path / "teacher"
    )
    assert (tmp_path / "staged" / "log_variance.safetensors").is_file()
    # A student of the same file has no use for it.
    convert_checkpoint(ConvertConfig(source=str(source), out=str(tmp_path / "student"), kind="sid"))
    assert not (tmp_path / "student" / "log_variance.safetensors").exists()


def test_published_names_of_students(tmp_path):
    """SiDA's own versions of the classes; a file of a student is not taken for a teacher."""
    edm = edm_preconditioning(tiny_edm("ddpmpp"), "EDMPrecond_EncoderDecoder")
    edm.model._class_name = "SongUNet_EncoderDecoder"
    edm2 = edm2_preconditioning(tiny_edm2(), "EDM_2_Precond_Generator", force_normalization=True, use_gan=True)
    edm2.unet._class_name = "UNet_EncoderDecoder"
    for content in (edm, edm2):
        path = write(tmp_path / "net.pkl", {"G_ema": content})
        assert isinstance(pipeline(path, "auto"), OneStepInterpolantPipeline)
        with pytest.raises(InputError, match="one-step student of SiDA"):
            pipeline(path, "edm")


def tiny_vae():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    return AutoencoderKL(**blocks, block_out_channels=(4,), norm_num_groups=4, latent_channels=4).eval()


@pytest.mark.parametrize("with_encoder", [True, False])
@torch.no_grad()
def test_latents_are_decoded_as_edm2_defines_them(with_encoder, tmp_path):
    mean, std = np.array([5.81, 3.25, 0.12, -2.15], np.float32), np.array([4.17, 4.62, 3.71, 3.28], np.float32)
    content = {"ema": edm2_preconditioning(tiny_edm2())}
    if with_encoder:
        scale = np.float32(0.5) / std
        content["encoder"] = Persistent("StabilityVAEEncoder", scale=scale, bias=-mean * scale)
    tiny_vae().save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    arguments = ["--source", write(tmp_path / "net.pkl", content), "--kind", "edm", "--vae", tmp_path / "vae"]
    settings = parse_settings(ConvertConfig, list(map(str, [*arguments, "--out", tmp_path / "folder"])))
    convert_checkpoint(settings)
    pipe = InterpolantPipeline.from_pretrained(tmp_path / "folder")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = latents * torch.tensor(std / 0.5).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    # EDM2's autoencoder sees images in [0, 1].
    expected = vae.decode(raw).sample.clamp(0, 1)
    torch.testing.assert_close(pipe.postprocess(latents, "pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_finished_student_goes_on(tmp_path):
    """SiD²A: a student of SiD is where another distillation of the same teacher starts."""
    folders = {}
    for kind, seed in (("edm", 1), ("sid", 2)):
        network = tiny_edm("ddpmpp", in_channels=1, augment_dim=9)
        torch.manual_seed(seed)
        torch.nn.init.normal_(network.out_conv.bias)
        path = write(tmp_path / f"{kind}.pkl", {"ema": edm_preconditioning(network)})
        folders[kind] = tmp_path / kind
        argv = ["--source", path, "--kind", kind, "--out", folders[kind]]
        convert_checkpoint(parse_settings(ConvertConfig, list(map(str, argv))))
    arguments = ["--objective", "sid", "--student", folders["sid"], "--max_steps", 1, "--learning_rate", 1e-9]
    distillation(folders["edm"], tmp_path / "run", *arguments).train()
    start, end = (OneStepInterpolantPipeline.from_pretrained(f) for f in (folders["sid"], tmp_path / "run"))
    torch.testing.assert_close(start.transformer.out_conv.bias, end.transformer.out_conv.bias)
    assert start.scheduler.init_noise_sigma == end.scheduler.init_noise_sigma


def test_checkpoints_that_cannot_be_converted(tmp_path):
    def message(content, kind="edm", **settings):
        path = write(tmp_path / "net.pkl", content)
        with pytest.raises(InputError) as caught:
            pipeline(path, kind, **settings)
        return str(caught.value)

    network = tiny_edm("ddpmpp")
    assert "a dictionary of loss_fn, step" in message({"loss_fn": 1, "step": 2})
    assert "a list" in message([1, 2])
    assert "VPPrecond. Only networks in EDM's" in message({"ema": edm_preconditioning(network, "VPPrecond")})
    other = edm_preconditioning(network)
    other.model._class_name = "ViT"
    assert "a network ViT; known are SongUNet" in message({"ema": other})
    assert "neither DDPM++ nor NCSN++" in message({"ema": edm_preconditioning(network, decoder_type="skip")})
    assert "res_balance = 0.5 instead of 0.3" in message({"ema": edm2_preconditioning(tiny_edm2(), res_balance=0.5)})
    assert "out_channels = 6 instead of 3" in message({"ema": edm_preconditioning(network, out_channels=6)})
    assert "has tricks = 1" in message({"ema": edm_preconditioning(network, tricks=1)})
    assert "cannot be built" in message({"ema": edm_preconditioning(network, model_channels="many")})
    assert "no noise level" in message({"ema": edm_preconditioning(network)}, "sid", init_sigma=100.0)
    assert "--kind edm or --kind sid" in message({"ema": edm_preconditioning(network)}, "auto")
    assert "`init_sigma` is 2.0" in message({"ema": edm_preconditioning(network)}, init_sigma=2.0)

    for change, text in (
        ({"model_channels": 16}, r"map_layer0\.weight is \(16, 8\) instead of \(32, 16\)"),
        ({"num_blocks": 2}, r"56 missing: enc\.8x8_block1\.norm0\.weight \(8,\)"),
        ({"attn_resolutions": []}, r"12 not part of it: enc\.8x8_block0\.norm2\.weight \(8,\)"),
    ):
        assert re.search(text, message({"ema": edm_preconditioning(network, **change)}))


def test_the_preconditioning_identity():
    """x̂0 = c_skip x + c_out F is what `convert` makes of an `edm` prediction, at EDM's noise levels."""
    interpolant = get_interpolant("edm")
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    x, f = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = interpolant.times_of_ratios(sigma)
    assert torch.allclose(interpolant.network_time(t, "log_sigma"), sigma.log() / 4, atol=1e-9)
    levels = sigma.view(-1, 1, 1, 1)
    expected = 0.25 / (levels**2 + 0.25) * x + levels / 2 / (levels**2 + 0.25).sqrt() * f
    assert torch.allclose(interpolant.convert(f, x, t, "edm", "sample"), expected, rtol=1e-9)
    assert math.isclose(float(interpolant.edm_weight(t)[2]), (2.5**2 + 0.25) / (2.5 * 0.5) ** 2, rel_tol=1e-9)
