"""Scaling between a VAE's latents and a network's: encoding undoes decoding."""

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import tiny_sit

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.pipelines import LatentScaling

SD = dict(scaling_factor=0.18215)
FLUX = dict(scaling_factor=0.3611, shift_factor=0.1159)
EDM2 = dict(scaling_factor=0.5, latents_mean=[5.81, 3.25, 0.12, -2.15], latents_std=[4.17, 4.62, 3.71, 3.28])


def vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, **config).double().eval()


@pytest.mark.parametrize(("config", "pixel_min"), [(SD, -1.0), (FLUX, -1.0), (EDM2, 0.0)])
def test_encoding_is_the_inverse_of_decoding(config, pixel_min):
    scaling = LatentScaling.of(vae(**config), pixel_min)
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaling.encode(scaling.decode(x)), x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(scaling.decode_pixels(scaling.encode_pixels(x)), x, rtol=1e-13, atol=1e-13)
    assert (
        scaling.encode(scaling.decode(x)[:2, None]) - x[:2, None]
    ).abs().max() < 1e-13  # further dimensions before C
    darkest, brightest = scaling.encode_pixels(torch.tensor([-1.0, 1.0]))
    assert (darkest, brightest) == (pixel_min, 1)


def test_latents_of_edm2_have_mean_0_and_deviation_a_half():
    """What its training needs of raw latents with the published mean and deviation of each channel."""
    mean, std = (
        torch.tensor(EDM2[name], dtype=torch.float64).view(4, 1, 1) for name in ("latents_mean", "latents_std")
    )
    noise = torch.randn(4096, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = mean + std * (noise - noise.mean(0)) / noise.std(0)
    scaled = LatentScaling.of(vae(**EDM2), 0.0).encode(raw)
    torch.testing.assert_close(scaled.mean(0).flatten(), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.std(0).flatten(), torch.full((4,), 0.5, dtype=torch.float64))


@torch.no_grad()
def test_a_pipeline_decodes_what_was_encoded_to_what_the_vae_makes_of_it():
    autoencoder = vae(**EDM2)
    pipeline = InterpolantPipeline(
        tiny_sit(in_channels=4), StochasticInterpolantScheduler(), autoencoder, vae_pixel_min=0.0
    )
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scaling = LatentScaling.of(autoencoder, 0.0)
    raw = autoencoder.encode(scaling.encode_pixels(pixels)).latent_dist.mean
    expected = autoencoder.decode(raw).sample * 2 - 1
    torch.testing.assert_close(pipeline.decode(scaling.encode(raw)), expected, rtol=1e-12, atol=1e-12)
