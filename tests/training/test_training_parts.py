"""The parts of training, each against its definition."""

import math
from functools import partial

import pytest
import torch
from diffusers_models import tiny_dit, tiny_unet
from helpers import tiny_edm, tiny_edm2, tiny_sit
from interpolant_families import TIMES, every_family, noise, truth

from si_distill import Condition
from si_distill.choices import LOSS_WEIGHTS
from si_distill.data import GlobalBatchSampler
from si_distill.errors import InputError
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, get_interpolant
from si_distill.pipelines import view_network
from si_distill.sample_noise import STREAMS, SampleNoise, sample_seed
from si_distill.training.config import TeacherConfig
from si_distill.training.loss_weights import regression_weight
from si_distill.training.parallel.blocks import keep_in_bfloat16
from si_distill.training.times import TimeSampler


def test_noise_of_a_sample_does_not_depend_on_the_slice_it_is_drawn_in():
    noise = SampleNoise(3)
    whole = noise.normal((2, 4), "generator", 5, 1, indices=range(8))
    parts = [noise.normal((2, 4), "generator", 5, 1, indices=range(i, i + 2)) for i in (0, 2, 4, 6)]
    assert torch.equal(whole, torch.cat(parts))
    u, x1 = noise.uniform_and_normal((2, 4), "critic", 5, indices=range(8))
    u_part, x1_part = noise.uniform_and_normal((2, 4), "critic", 5, indices=[6])
    assert torch.equal(u[6:7], u_part)
    assert torch.equal(x1[6:7], x1_part)


def test_seed_stream_counters_and_sample_all_matter():
    seeds = {
        sample_seed(seed, stream, step, index)
        for seed in range(3)
        for stream in STREAMS
        for step in range(3)
        for index in range(3)
    }
    assert len(seeds) == 3 * len(STREAMS) * 3 * 3


def test_noise_is_standard_normal_and_samples_are_uncorrelated():
    noise = SampleNoise(0)
    x = noise.normal((4,), "generator", 0, indices=range(4000)).double()
    # Five standard errors of the mean, the variance and the correlation of neighbouring samples.
    assert x.mean().abs() < 5 / math.sqrt(16000)
    assert (x.var() - 1).abs() < 5 * math.sqrt(2 / 16000)
    assert (x[1:] * x[:-1]).mean().abs() < 5 / math.sqrt(16000)
    counts = noise.integers(5, "labels", 0, indices=range(5000)).bincount(minlength=5)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(800)


def test_uniform_times_fill_their_range():
    t = TimeSampler("uniform", 0.2, 0.6)(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(t, torch.linspace(0.2, 0.6, 101, dtype=torch.float64))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 0.7)])
def test_logit_normal_times_have_the_quantiles_of_their_law(low, high):
    sampler = TimeSampler("logit_normal", low, high, mean=-0.5, std=0.8)
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t = sampler(u)
    law = torch.distributions.Normal(*torch.tensor([-0.5, 0.8], dtype=torch.float64))
    ends = law.cdf(torch.logit(torch.tensor([low, high], dtype=torch.float64)))
    share = (law.cdf(torch.logit(t)) - ends[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(share, u, rtol=0, atol=1e-9)
    assert ((t > low) & (t < high)).all()


def level(interpolant, t: torch.Tensor) -> torch.Tensor:
    """σ = β/α at t."""
    c = interpolant.coefficients(t)
    return c.beta / c.alpha


@pytest.mark.parametrize("name", GAUSSIAN_INTERPOLANTS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 0.7)])
def test_lognormal_times_have_the_quantiles_of_their_law(name, low, high):
    it = get_interpolant(name)
    u = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    t = TimeSampler("lognormal", low, high, mean=-0.4, std=1.0, interpolant=it)(u)
    law = torch.distributions.Normal(*torch.tensor([-0.4, 1.0], dtype=torch.float64))
    ends = torch.special.ndtr(level(it, torch.tensor([low, high], dtype=torch.float64)).log() + 0.4)
    share = (law.cdf(level(it, t).log()) - ends[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(share, u, rtol=0, atol=1e-7)
    assert (t.diff() > 0).all()
    assert ((t > low) & (t < high)).all()


@pytest.mark.parametrize("name", GAUSSIAN_INTERPOLANTS)
def test_karras_times_have_the_levels_of_sids_generator(name):
    it = get_interpolant(name)
    u = torch.linspace(0, 1, 33, dtype=torch.float64)
    t = TimeSampler("karras", 0.0, 0.8, interpolant=it)(u)
    # `ddpm` begins at σ = 0.01, later than EDM's map: the law is what is left of it.
    map_of_first = ((level(it, torch.zeros_like(u))[0] ** (1 / 7)) - 0.002 ** (1 / 7)) / (
        80 ** (1 / 7) - 0.002 ** (1 / 7)
    )
    first = max(0.0, float(map_of_first))
    place = first + (0.8 - first) * u
    sigma = (0.002 ** (1 / 7) + place * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(level(it, t), sigma, rtol=1e-6, atol=0)


def test_karras_times_on_edm_are_uniform_in_its_own_map():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    it = get_interpolant("edm", sigma_max=20.0, rho=5.0)
    torch.testing.assert_close(TimeSampler("karras", 0.1, 0.9, interpolant=it)(u), 0.1 + 0.8 * u)


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "lognormal", "karras"])
@pytest.mark.parametrize("interpolant", ["linear", "vp", "edm"])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_times_stay_in_their_range_at_the_ends_of_the_uniform_numbers(name, interpolant, u):
    t = TimeSampler(name, 0.02, 0.98, interpolant=get_interpolant(interpolant))(torch.tensor([u], dtype=torch.float32))
    assert t.dtype == torch.float32
    if name != "karras" or interpolant == "edm":
        assert 0.02 - 1e-7 <= t.item() <= 0.98 + 1e-7
    assert 0 < t.item() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="cosine"), "'cosine'.*uniform, logit_normal, lognormal, karras"),
        (dict(name="lognormal"), "'lognormal' .* needs the interpolant"),
        (dict(name="karras"), "'karras' .* needs the interpolant"),
        (dict(name="lognormal", mean=100.0, interpolant=get_interpolant("edm")), "no times between t_min=0.0"),
        (dict(name="karras", t_max=0.05, interpolant=get_interpolant("ddpm")), "t_max=0.05 on the interpolant 'ddpm'"),
    ],
)
def test_laws_of_times_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeSampler(**arguments)


def test_settings_build_the_law_for_the_interpolant():
    settings = TeacherConfig(
        output_dir="a", interpolant="edm", time_sampler="lognormal", time_mean=-1.2, time_std=1.2, t_max=0.9
    )
    it = settings.build_interpolant()
    assert settings.build_time_sampler(it, "time") == TimeSampler("lognormal", 0.0, 0.9, -1.2, 1.2, it)


def test_batches_of_all_ranks_are_the_global_batch_and_an_epoch_shows_every_image_once():
    length, steps = 12, 6
    one = iter(GlobalBatchSampler(length, 4, 0, 1, seed=1))
    two = [iter(GlobalBatchSampler(length, 2, rank, 2, seed=1)) for rank in range(2)]
    seen = []
    for _ in range(steps):
        batch = next(one)
        assert batch == next(two[0]) + next(two[1])
        seen += batch
    assert sorted(seen[:length]) == list(range(length))
    assert sorted(seen[length:]) == list(range(length))
    assert seen[:length] != seen[length:]


def test_a_sampler_started_later_continues_the_same_row():
    first = iter(GlobalBatchSampler(7, 3, 1, 2, seed=4))
    expected = [next(first) for _ in range(9)][4:]
    later = iter(GlobalBatchSampler(7, 3, 1, 2, seed=4, start=4))
    assert [next(later) for _ in range(5)] == expected


# Weights of noise and score networks.


@every_family
@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_weights_of_noise_and_score_networks_are_losses_of_the_velocity_and_the_diffusion(
    name, config, prediction_type
):
    interpolant = get_interpolant(name, **config)
    x0, x1 = truth()
    t = TIMES
    c, x_t = interpolant.coefficients(t), interpolant.interpolate(x0, x1, t)
    prediction = noise(3, *x0.shape)
    squared = (prediction - interpolant.target(x0, x1, t, prediction_type)).square().mean((1, 2, 3))

    def in_space(space: str) -> torch.Tensor:
        converted = interpolant.convert(prediction, x_t, t, prediction_type, space)
        return (converted - interpolant.target(x0, x1, t, space)).square().mean((1, 2, 3))

    losses = {law: regression_weight(law, c, prediction_type) * squared for law in LOSS_WEIGHTS}
    torch.testing.assert_close(losses["none"], in_space("epsilon"), rtol=1e-8, atol=0)
    torch.testing.assert_close(losses["velocity"], in_space("velocity"), rtol=1e-8, atol=0)
    # ½ g² of dx = f x dt + g dw with these marginals is β β' − β² α' / α (Song et al. 2021).
    half_diffusion = c.beta * c.d_beta - c.beta**2 * c.d_alpha / c.alpha
    torch.testing.assert_close(losses["likelihood"], half_diffusion * in_space("score"), rtol=1e-8, atol=0)


def test_likelihood_weight_of_vp_is_half_its_beta_over_the_variance():
    interpolant = get_interpolant("vp", b0=0.1, b1=20.0)
    c = interpolant.coefficients(TIMES)
    rate = 0.1 + (20.0 - 0.1) * TIMES
    expected = rate / 2 / c.beta**2
    torch.testing.assert_close(regression_weight("likelihood", c, "epsilon"), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prediction_type="velocity"), "for noise and score networks"),
        (dict(prediction_type="epsilon", t_min=0.001), "infinite at `t_max` = 1"),
        (dict(prediction_type="score", t_min=0.001, t_max=1.0, interpolant="trigonometric"), "infinite at `t_max` = 1"),
        (dict(prediction_type="epsilon", t_max=0.999, loss_weight="likelihood"), "infinite at `t_min` = 0"),
    ],
)
def test_loss_weights_that_cannot_work_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TeacherConfig(**{"output_dir": "unset", "loss_weight": "velocity", **changes})


@pytest.mark.parametrize("kind", ["sit", "dit", "unet", "edm", "edm2"])
def test_a_teacher_kept_in_bfloat16_says_what_autocast_says(kind):
    networks = {
        "sit": partial(tiny_sit, learn_sigma=True),
        "dit": tiny_dit,
        "unet": tiny_unet,
        "edm": partial(tiny_edm, "ddpmpp"),
        "edm2": tiny_edm2,
    }
    network = networks[kind]()
    view = view_network(network)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, *view.sample_shape, generator=generator), torch.tensor([0.3, 0.9])

    @torch.no_grad()
    def prediction():
        with torch.autocast("cpu", torch.bfloat16):
            return view(*inputs, Condition(torch.tensor([0, 1])))[0]

    expected, before = prediction(), sum(p.numel() * p.element_size() for p in network.parameters())
    keep_in_bfloat16(network)
    assert prediction().equal(expected)
    after = sum(p.numel() * p.element_size() for p in network.parameters())
    # EDM2's weights are normalised in float32 in every forward, and UNet2DModel names no repeated blocks.
    assert after == before if kind in ("edm2", "unet") else after < before
