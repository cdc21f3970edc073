"""Arguments of pipelines that cannot be meant: a sentence that names the argument, before the network is asked."""

import pytest
import torch
from helpers import tiny_sit
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_caches import tiny_autoencoder

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

KINDS = (OneStepInterpolantPipeline, InterpolantPipeline)


def pipeline(cls=OneStepInterpolantPipeline, vae=None, **config):
    made = cls(tiny_sit(**config), StochasticInterpolantScheduler(), vae)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(latents=[[1.0]]), TypeError, "`latents` is a list; it is a tensor"),
        (dict(latents="noise"), TypeError, "`latents` is a str"),
        (dict(latents=torch.zeros(2, 1, 8, 8, dtype=torch.int64)), ValueError, "`latents` is of torch.int64"),
        (dict(latents=torch.full((2, 1, 8, 8), torch.nan)), ValueError, "`latents` holds values that are not finite"),
        (dict(generator=3), TypeError, "`generator` is a int; pass a `torch.Generator`"),
        (dict(generator=[3, 4]), TypeError, "`generator` holds a int"),
        (dict(generator=[torch.Generator(), None]), TypeError, "`generator` holds a NoneType"),
    ],
)
def test_noise_and_generators_of_another_type(cls, arguments, error, words):
    with pytest.raises(error, match=words):
        pipeline(cls)([0, 1], **arguments)


@pytest.mark.parametrize("cls", KINDS)
def test_latents_without_a_vae_are_no_picture(cls):
    made = pipeline(cls, in_channels=4)
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(
            ValueError, match=r"works on latents of 4 channels, and there is no VAE.*output_type=.latent."
        ):
            made([0], output_type=output_type)
    assert made([0], output_type="latent").images.shape == (1, 4, 8, 8)
    assert pipeline(cls, tiny_autoencoder(), in_channels=4)([0], output_type="pt").images.shape == (1, 3, 16, 16)


ANYTHING = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.binary(max_size=2)
    | st.lists(st.integers(-1, 4) | st.text(max_size=2) | st.none(), max_size=3)
    | st.sampled_from([torch.zeros(1), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.Generator(), {}, set()])
)  # fmt: skip
NAMES = ("class_labels", "generator", "latents", "batch_size", "num_inference_steps", "guidance_scale", "output_type",
         "num_images_per_input", "image")  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3), st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_whatever_is_given_is_images_or_a_sentence(arguments, cls):
    try:
        images = pipeline(cls)(
            **{"class_labels": [0, 1], "num_inference_steps": 1, "output_type": "pt", **arguments}
        ).images
    except (ValueError, TypeError) as error:
        assert any(word in str(error) for word in ("`", "label", "class", "generators"))  # noqa: PT017
    else:
        assert len(images) >= 1
