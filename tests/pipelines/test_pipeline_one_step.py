"""The student's pipeline: one forward, equal to the formula, in pixels and in latents."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from helpers import UNTOLD, field_on, tiny_sit

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler, get_interpolant


def student(scheduler=None, vae=None, **config):
    return OneStepInterpolantPipeline(tiny_sit(**config), StochasticInterpolantScheduler(**(scheduler or {})), vae)


def tiny_vae(**config):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=4,
        latent_channels=4,
        **config,
    ).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def count_forwards(network):
    """Rows of each forward from now on."""
    rows = []
    network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    return rows


def test_the_student_is_evaluated_exactly_once():
    pipe = student()
    rows = count_forwards(pipe.transformer)
    pipe([0, 1, 2])
    assert rows == [3]


@pytest.mark.parametrize("prediction_type", ["velocity", "sample", "epsilon", "score", "v_prediction", "edm"])
@pytest.mark.parametrize("name", ["linear", "trigonometric", "vp", "ddpm", "edm"])
def test_latents_are_the_one_step_map(name, prediction_type):
    interpolant = get_interpolant(name)
    init_time = interpolant.default_init_time(prediction_type)
    pipe = student({"interpolant": name, "prediction_type": prediction_type, "init_time": init_time})
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        field = field_on(interpolant, lambda x, t: pipe.transformer(x, t, labels).sample, prediction_type)
        expected, elsewhere = (field.one_step(noise, t, UNTOLD) for t in (init_time, 0.5))
    actual = pipe(labels, latents=noise, output_type="latent").images
    # The same float32 operations on the same numbers; the margin is for another order within a matrix product.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert (actual - elsewhere).abs().max() > 1e-4


def test_the_pipeline_draws_the_noise_of_the_generator():
    pipe = student()
    noise = torch.randn(2, 1, 8, 8, generator=seeded(5))
    drawn = pipe([0, 1], generator=seeded(5), output_type="latent").images
    assert torch.equal(drawn, pipe([0, 1], latents=noise, output_type="latent").images)
    assert not torch.equal(drawn, pipe([0, 1], generator=seeded(6), output_type="latent").images)


def test_an_image_depends_on_its_own_generator_only():
    pipe = student()
    batch = pipe([0, 1, 2], generator=[seeded(i) for i in range(3)], output_type="pt").images
    for i in range(3):
        alone = pipe(i, generator=seeded(i), output_type="pt").images
        # A matrix product of 3 rows and of 1 may add in another order.
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_inference_steps=4), "but this student has one step"),
        (dict(num_inference_steps=True), "but this student has one step"),
        (dict(guidance_scale=4.0), "guidance it was distilled with is already inside"),
        (dict(output_type="jpeg"), "'jpeg'.*pil, np, pt, latent"),
        (dict(generator=[torch.Generator()]), "1 generators for 2 images"),
        (dict(latents=torch.zeros(2, 1, 4, 4)), r"\(2, 1, 4, 4\).*\(2, 1, 8, 8\)"),
        (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "prompt_embeds.*latents"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_the_network_runs(kwargs, message):
    pipe = student()
    rows = count_forwards(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        pipe([0, 1], **kwargs)
    assert rows == []


def test_a_teacher_in_the_one_step_pipeline_is_the_teacher_at_one_step():
    teacher = InterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler(solver="heun"), id2label={0: "zero"})
    one_step = OneStepInterpolantPipeline(**teacher.components, **teacher.parameters)
    teacher.set_progress_bar_config(disable=True)
    expected = teacher(["zero"], num_inference_steps=1, generator=seeded(), output_type="latent").images
    assert torch.equal(one_step(["zero"], generator=seeded(), output_type="latent").images, expected)


def test_a_callback_sees_and_replaces_the_latents():
    pipe = student()
    calls = []

    def callback(pipeline, step, timestep, tensors):
        calls.append((pipeline, step, float(timestep), list(tensors)))
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    images = pipe([0, 1], output_type="pt", callback_on_step_end=callback).images
    assert calls == [(pipe, 0, 1.0, ["latents"])]
    assert torch.equal(images, torch.full((2, 1, 8, 8), 0.75))


def test_a_callback_that_returns_nothing_changes_nothing():
    pipe = student()
    plain = pipe(0, generator=seeded(), output_type="latent").images
    watched = pipe(0, generator=seeded(), output_type="latent", callback_on_step_end=lambda *args: None).images
    assert torch.equal(plain, watched)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = student(in_channels=channels)
    latents = pipe([0, 1], generator=seeded(), output_type="latent").images
    tensors = pipe([0, 1], generator=seeded(), output_type="pt").images
    arrays = pipe([0, 1], generator=seeded(), output_type="np").images
    images = pipe([0, 1], generator=seeded()).images
    assert latents.min() < -1
    assert torch.equal(tensors, (latents / 2 + 0.5).clamp(0, 1))
    assert arrays.shape == (2, 8, 8, channels)
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert [image.mode for image in images] == [mode, mode]
    pixels = np.asarray(images[1]).reshape(8, 8, channels)
    np.testing.assert_array_equal(pixels, (arrays[1] * 255).round().astype("uint8"))
    (as_tuple,) = pipe([0, 1], generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, tensors)


@pytest.mark.parametrize("shift_factor", [None, 0.3])
def test_a_vae_decodes_with_its_scale_and_shift(shift_factor):
    vae = tiny_vae(scaling_factor=0.25, shift_factor=shift_factor)
    pipe = student(vae=vae, in_channels=4)
    latents = pipe([0, 1], generator=seeded(), output_type="latent").images
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.25 + (shift_factor or 0.0)).sample / 2 + 0.5).clamp(0, 1)
    images = pipe([0, 1], generator=seeded(), output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)  # the same float32 operations

    vae.enable_slicing()
    sliced = pipe([0, 1], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(sliced, images, rtol=0, atol=1e-5)  # convolutions of 1 and of 2 images


def test_latents_with_a_mean_and_a_deviation_by_channel_and_pixels_from_0(tmp_path):
    mean, std = [1.0, -2.0, 0.5, 0.0], [4.0, 3.0, 2.0, 1.0]
    vae = tiny_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    pipe = student(vae=vae, in_channels=4)
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        expected = vae.decode(
            latents / 0.5 * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        ).sample
        torch.testing.assert_close(pipe.decode(latents), expected, rtol=1e-5, atol=1e-5)
    # The same autoencoder, used with images in [0, 1].
    pipe.register_to_config(vae_pixel_min=0.0)
    pipe.save_pretrained(tmp_path)
    loaded = OneStepInterpolantPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.postprocess(latents, "pt"), expected.clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_a_tiny_autoencoder_decodes_too():
    torch.manual_seed(0)
    blocks = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4))
    counts = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    vae = AutoencoderTiny(**blocks, **counts, scaling_factor=2.0).eval()
    pipe = student(vae=vae, in_channels=4)
    latents = pipe([0], generator=seeded(), output_type="latent").images
    with torch.no_grad():
        expected = (vae.decode(latents / 2.0).sample / 2 + 0.5).clamp(0, 1)
    images = pipe([0], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_bfloat16_sees_the_same_noise():
    pipe = student(in_channels=3)
    exact = pipe([0, 1], generator=seeded(), output_type="latent").images
    rounded = pipe.to(torch.bfloat16)([0, 1], generator=seeded(), output_type="latent").images
    assert rounded.dtype == torch.float32
    noise = torch.randn(2, 3, 8, 8, generator=seeded())
    assert torch.equal(rounded, pipe([0, 1], latents=noise, output_type="latent").images)
    # x̂0 = x1 − v: the noise is exact, and v, of size 1, has 8 bits that a few layers wear down. Other noise is off by 3.
    assert 1e-5 < (rounded - exact).abs().max() < 0.05


def test_model_offload_brings_components_in_and_frees_them():
    pipe = student(vae=tiny_vae(), in_channels=4)
    expected = pipe([0], generator=seeded(), output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks of the accelerator, on the device that is always there
    assert len(pipe._all_hooks) == 2
    assert torch.equal(pipe([0], generator=seeded(), output_type="pt").images, expected)
    assert torch.equal(pipe([0], generator=seeded(), output_type="pt").images, expected)


def test_the_student_compiles_without_graph_breaks_and_saves(tmp_path):
    pipe = student()
    expected = pipe([0, 1], generator=seeded(), output_type="pt").images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    compiled = pipe([0, 1], generator=seeded(), output_type="pt").images
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6)
    pipe.save_pretrained(tmp_path)
    loaded = OneStepInterpolantPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded([0, 1], generator=seeded(), output_type="pt").images, expected)


def test_one_step_shows_no_progress_bar(capfd):
    student()([0])
    assert capfd.readouterr().err == ""
