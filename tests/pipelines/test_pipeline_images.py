"""Pipelines that start from an image: bridges' teachers and students, and networks that see an image beside noise."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny_sit
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

CHANNELS = 3


def bridge(cls, condition_channels=CHANNELS, num_classes=3, upsampling=None, **scheduler):
    """A bridge whose network predicts the sample, with random weights."""
    network = tiny_sit(in_channels=CHANNELS, num_classes=num_classes, condition_channels=condition_channels)
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample", **scheduler)
    pipeline = cls(network, scheduler, image_upsampling=upsampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def student(**kwargs):
    return bridge(OneStepInterpolantPipeline, condition_channels=2 * CHANNELS, noise_channels=CHANNELS, **kwargs)


def levels(count: int = 2, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, CHANNELS, size, size), generator=generator, dtype=torch.uint8)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def run(pipeline, image, labels=(0, 2), **kwargs):
    kwargs = {"generator": seeds(*range(len(labels))), "output_type": "latent", **kwargs}
    return pipeline(list(labels), image=image, **kwargs).images


def test_a_student_is_its_network_at_the_image_beside_image_and_noise():
    pipeline, x1 = student(), levels() / 127.5 - 1
    noise = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    output = pipeline([0, 2], image=x1, latents=noise, output_type="latent")
    with torch.no_grad():
        network = pipeline.transformer(x1, torch.ones(2), torch.tensor([0, 2]), condition=torch.cat([x1, noise], 1))
    assert torch.equal(output.images, network.sample)
    assert output.num_network_evaluations == 1
    # Its own noise is that of its generator; each image depends on its own alone.
    drawn = run(pipeline, x1)
    alone = [run(pipeline, x1[i : i + 1], [2 * i], generator=seeds(i)) for i in range(2)]
    torch.testing.assert_close(drawn, torch.cat(alone))
    assert not torch.equal(drawn, run(pipeline, x1, generator=seeds(2, 3)))


def test_a_teacher_goes_from_the_image_by_posterior_and_ode():
    pipeline, x1 = bridge(InterpolantPipeline, interpolant_kwargs={"scale": 0.5}), levels() / 127.5 - 1
    labels = torch.tensor([0, 2])

    def sample_prediction(x_t, t):
        with torch.no_grad():
            return pipeline.transformer(x_t, torch.full((2,), t), labels, condition=x1).sample

    # Liu et al. 2023 (I2SB), algorithm 2, with noise of these generators, at t = sin²(π/2), sin²(π/3), sin²(π/6), 0.
    generators, x = seeds(0, 1), x1
    for t, s in ((1.0, 0.75), (0.75, 0.25), (0.25, 0.0)):
        noise = torch.cat([torch.randn(1, CHANNELS, 8, 8, generator=g) for g in generators]) if s else 0
        spread = 0.5 * (s * (t - s) / t) ** 0.5
        x = s / t * x + (1 - s / t) * sample_prediction(x, t) + spread * noise
    output = pipeline([0, 2], image=x1, num_inference_steps=3, generator=seeds(0, 1), output_type="latent")
    torch.testing.assert_close(output.images, x, atol=2e-5, rtol=1e-5)
    assert output.num_network_evaluations == 3
    for solver, evaluations in (("euler", 4), ("heun", 6)):
        output = pipeline([0, 2], image=x1, num_inference_steps=4, solver=solver, generator=seeds(0, 1))
        assert (len(output.images), output.num_network_evaluations) == (2, evaluations)
    # One step is the x̂0-prediction at the image.
    torch.testing.assert_close(run(pipeline, x1, num_inference_steps=1), sample_prediction(x1, 1.0))


def test_a_network_beside_noise_sees_the_image():
    network = tiny_sit(in_channels=1, num_classes=0, condition_channels=CHANNELS)
    pipeline = OneStepInterpolantPipeline(network, StochasticInterpolantScheduler(prediction_type="sample"))
    x1, noise = levels() / 127.5 - 1, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(image=x1, latents=noise, output_type="latent").images
    with torch.no_grad():
        assert torch.equal(images, network(noise, torch.ones(2), condition=x1).sample)


@pytest.mark.parametrize("size", [8, 4])
def test_every_form_of_an_image_means_the_same(size):
    pipeline = student(upsampling={"factor": 2, "mode": "nearest"})
    x = levels(size=size)
    arrays = x.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    forms = {
        "uint8 tensor": x,
        "tensor": x / 127.5 - 1,
        "tensors": list(x / 127.5 - 1),
        "array": arrays,
        "numbers": arrays.astype(np.float64) / 255,
        "arrays": list(arrays),
        "pictures": pictures,
        "transparent": [picture.convert("RGBA") for picture in pictures],
    }
    whole = x if size == 8 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = run(pipeline, whole)
    for name, form in forms.items():
        torch.testing.assert_close(run(pipeline, form), wanted, msg=lambda text, name=name: f"{name}: {text}")
    alone = run(pipeline, pictures[0], [0])
    torch.testing.assert_close(alone, wanted[:1])


def test_small_images_are_enlarged_as_in_training():
    from si_distill.data.degradations import get_degradation

    degradation, x = get_degradation("downsample", factor=2, upsample="bicubic"), levels() / 127.5 - 1
    pipeline = student(upsampling={"factor": 2, "mode": "bicubic"})
    torch.testing.assert_close(run(pipeline, degradation.small(x)), run(pipeline, degradation(x)))


def test_several_images_of_each_input_follow_each_other():
    pipeline, x = student(), levels()
    images = run(pipeline, x, num_images_per_input=3, generator=seeds(*range(6)))
    assert images.shape == (6, CHANNELS, 8, 8)
    for place in range(6):
        alone = run(pipeline, x[place // 3 : place // 3 + 1], [(0, 2)[place // 3]], generator=seeds(place))
        torch.testing.assert_close(images[place : place + 1], alone)


def test_a_map_without_noise_gives_one_image():
    pipeline = bridge(OneStepInterpolantPipeline, num_classes=0)
    first, second = (pipeline(image=levels(), generator=seeds(i, i + 1), output_type="pt").images for i in range(2))
    assert torch.equal(first, second)


def test_folders_of_bridges_carry_everything(tmp_path, remote_code_cache):
    for name, pipeline, kwargs in (
        ("student", student(upsampling={"factor": 2, "mode": "nearest"}), {}),
        ("teacher", bridge(InterpolantPipeline), {"num_inference_steps": 3}),
    ):
        wanted = run(pipeline, levels(), **kwargs)
        pipeline.save_pretrained(tmp_path / name)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(run(loaded, levels(), **kwargs), wanted)
        own = type(pipeline).from_pretrained(tmp_path / name)
        assert own.config.image_upsampling == pipeline.config.image_upsampling
        assert torch.equal(run(own, levels(), **kwargs), wanted)


@pytest.mark.parametrize(
    ("image", "kwargs", "words"),
    [
        (None, {}, r"turns an image into another one: pass `image`, of 8×8 pixels and 3 channels"),
        (levels(), dict(class_labels=[1]), "There are 1 labels for 2 images"),
        (levels(), dict(class_labels=None), "has 3 classes: pass `class_labels`"),
        (levels(), dict(batch_size=2), "`batch_size` is the number of images given"),
        (
            levels(size=6),
            {},
            r"`image` has 6×6 pixels, but this network takes 8×8, or the small ones of 4×4 that it was",
        ),
        (levels()[:, :1], {}, r"`image` has 1 channel, but this network's images have 3.*convert\('RGB'\)"),
        ([levels()[0], levels(size=4)[0]], {}, r"have different sizes \(4×4, 8×8\)"),
        ([], {}, "`image` is empty"),
        (levels() / 255.0 * 3, {}, "tensors hold values from -1 to 1"),
        (np.full((8, 8, 3), np.nan), {}, "has values from nan to nan"),
        (levels().int(), {}, "`image` is of torch.int32; images are uint8 or floating point"),
        (levels()[0, 0], {}, r"has the shape \(8, 8\); tensors are"),
        (np.zeros(3, np.uint8), {}, r"has the shape \(3,\); arrays are"),
        (levels(), dict(num_images_per_input=0), "`num_images_per_input` must be at least 1"),
        (levels(), dict(latents=torch.zeros(2, 1, 8, 8)), r"`latents` has shape .* need \(2, 3, 8, 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(image, kwargs, words):
    pipeline = student(upsampling={"factor": 2, "mode": "nearest"})
    with pytest.raises(ValueError, match=words):
        pipeline(**{"class_labels": [0, 1], **kwargs}, image=image)


def test_what_is_no_image_is_named():
    with pytest.raises(TypeError, match="`image` holds a str; images are PIL images, NumPy arrays or tensors"):
        student()([0], image="cat.png")


def test_networks_that_take_no_image_say_so():
    pipeline = OneStepInterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler())
    with pytest.raises(ValueError, match="generates from noise alone: leave it out"):
        pipeline([0], image=levels())
    with pytest.raises(ValueError, match="`num_images_per_input` is 2, but this network takes no image"):
        pipeline([0], num_images_per_input=2)
    with pytest.raises(ValueError, match="sampling starts at `image` and draws noise on the way"):
        bridge(InterpolantPipeline)([0, 1], image=levels(), latents=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("upsampling", "words"),
    [
        ({"factor": 3, "mode": "nearest"}, "the factor 3; it must be a whole number above 1 that divides 8"),
        ({"factor": 2, "mode": "area"}, "a `factor` and a `mode`, one of: nearest, bicubic"),
        ({"factor": 2}, "a `factor` and a `mode`"),
    ],
)
def test_upsampling_that_cannot_be_done_is_refused(upsampling, words):
    with pytest.raises(ValueError, match=words):
        student(upsampling=upsampling)
