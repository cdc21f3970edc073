"""The bridge x_t = (1 − t) x0 + t x1 + γ z in float64: derivatives, pinned conversions, the posterior, what it refuses."""

import math

import pytest
import torch
from helpers import UNTOLD, field_on
from interpolant_families import TIMES, double, noise

from si_distill import Condition, Field, StochasticInterpolantScheduler
from si_distill.choices import TIME_SAMPLERS
from si_distill.interpolants import PREDICTIONS, BridgeInterpolant, get_interpolant
from si_distill.training.times import TimeSampler


class QuarticBridge(BridgeInterpolant):
    """Another γ, s t² (1 − t)², without singular ends."""

    name = "quartic"
    singular_ends = ()

    def __init__(self, scale: float = 2.0):
        self.scale = scale

    def _gamma(self, t):
        return self.scale * (t * (1 - t)) ** 2, 2 * self.scale * t * (1 - t) * (1 - 2 * t)


BRIDGES = [get_interpolant("bridge"), get_interpolant("bridge", scale=0.3), QuarticBridge()]
every_bridge = pytest.mark.parametrize("bridge", BRIDGES, ids=repr)
COLUMN = TIMES.reshape(-1, 1, 1, 1)


@pytest.fixture
def pair():
    """(x0, x1, z) at 25 times, as small images."""
    return tuple(noise(seed, len(TIMES), 2, 3, 3) for seed in range(3))


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@every_bridge
def test_derivatives_are_those_of_autograd(bridge):
    t = TIMES.clone().requires_grad_()
    c = bridge.coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.beta, c.d_beta), (c.gamma, c.d_gamma)):
        close(derivative, torch.autograd.grad(value.sum(), t, retain_graph=True)[0])


@every_bridge
def test_ends_are_the_pair_without_noise(bridge):
    c = bridge.coefficients(double(0, 1))
    assert torch.equal(c.alpha, double(1, 0))
    assert torch.equal(c.beta, double(0, 1))
    assert torch.equal(c.gamma, double(0, 0))
    assert tuple(double(0, 1)[~c.d_gamma.isfinite()].tolist()) == bridge.singular_ends
    assert (bridge.coefficients(TIMES).gamma > 0).all()


def test_brownian_bridge_has_its_variance():
    close(get_interpolant("bridge", scale=3.0).coefficients(TIMES).gamma ** 2, 9 * TIMES * (1 - TIMES))


@every_bridge
def test_velocity_is_the_derivative_of_the_path(bridge, pair):
    x0, x1, z = pair
    t = COLUMN.expand_as(x0).clone().requires_grad_()
    c = bridge.coefficients(t)
    path = c.alpha * x0 + c.beta * x1 + c.gamma * z
    close(bridge.interpolate(x0, x1, TIMES, z), path.detach())
    close(bridge.velocity(x0, x1, TIMES, z), torch.autograd.grad(path.sum(), t)[0])
    close(bridge.target(x0, x1, TIMES, "velocity", z), bridge.velocity(x0, x1, TIMES, z))
    assert torch.equal(bridge.target(x0, x1, TIMES, "sample"), x0)


@every_bridge
def test_pinned_conversions_recover_the_pair_and_each_other(bridge, pair):
    x0, x1, z = pair
    x_t, velocity = bridge.interpolate(x0, x1, TIMES, z), bridge.velocity(x0, x1, TIMES, z)
    close(bridge.convert(velocity, x_t, TIMES, "velocity", "sample", x1=x1), x0)
    close(bridge.convert(x0, x_t, TIMES, "sample", "velocity", x1=x1), velocity)
    close(bridge.convert(velocity, x_t, TIMES, "velocity", "sample", z=z), x0)
    close(bridge.convert(x0, x_t, TIMES, "sample", "velocity", z=z), velocity)
    guess = noise(5, *x0.shape)
    there = bridge.convert(guess, x_t, TIMES, "sample", "velocity", x1=x1)
    close(bridge.convert(there, x_t, TIMES, "velocity", "sample", x1=x1), guess)


@every_bridge
def test_velocity_error_is_kappa_times_denoising_error(bridge, pair):
    x0, x1, z = pair
    x_t, guess = bridge.interpolate(x0, x1, TIMES, z), noise(5, *x0.shape)
    error = bridge.convert(guess, x_t, TIMES, "sample", "velocity", x1=x1) - bridge.velocity(x0, x1, TIMES, z)
    close(error, bridge.coefficients(TIMES).kappa.reshape(-1, 1, 1, 1) * (guess - x0))
    if bridge.name == "bridge":  # whatever the scale
        close(error, -(guess - x0) / (2 * COLUMN))


def test_at_scale_0_it_is_linear(pair):
    x0, x1, z = pair
    bridge, linear = get_interpolant("bridge", scale=0), get_interpolant("linear")
    assert bridge.singular_ends == ()
    x_t = linear.interpolate(x0, x1, TIMES)
    assert torch.equal(bridge.interpolate(x0, x1, TIMES, z), x_t)
    assert torch.equal(bridge.velocity(x0, x1, TIMES, z), linear.velocity(x0, x1, TIMES))
    assert torch.equal(bridge.interpolate(x0, x1, TIMES), x_t)  # noise may be left out
    ends = torch.cat([double(0, 1), TIMES])
    for name in ("alpha", "beta", "gamma", "d_alpha", "d_beta", "d_gamma", "kappa"):
        values = (getattr(it.coefficients(ends), name) for it in (bridge, linear))
        assert torch.equal(*values), name
    for kinds in (("velocity", "sample"), ("sample", "velocity")):
        assert torch.equal(bridge.convert(x0, x_t, TIMES, *kinds, x1=x1), linear.convert(x0, x_t, TIMES, *kinds))


def test_posterior_is_that_of_brownian_motion_between_its_ends(pair):
    # Cov(x_s, x_t | x0, x1) = scale² s (1 − t) for s < t: the conditional Gaussian given x_t, computed from it.
    x0, x1, z = pair
    bridge, s = get_interpolant("bridge", scale=0.7), 0.4 * TIMES
    x_t, n = bridge.interpolate(x0, x1, TIMES, z), noise(5, *x0.shape)
    covariance, variance_t, variance_s = (0.49 * v for v in (s * (1 - TIMES), TIMES * (1 - TIMES), s * (1 - s)))

    def column(v):
        return v.reshape(-1, 1, 1, 1)

    mean_s, mean_t = (column(1 - v) * x0 + column(v) * x1 for v in (s, TIMES))
    mean = mean_s + column(covariance / variance_t) * (x_t - mean_t)
    std = column(variance_s - covariance**2 / variance_t).sqrt()
    close(bridge.posterior(x_t, x0, TIMES, s, n), mean + std * n)
    close(bridge.posterior(x_t, x0, TIMES, 0 * s, n), x0)
    close(bridge.posterior(x1, x0, double(1.0), double(0.4), n), bridge.interpolate(x0, x1, double(0.4), n))
    assert not hasattr(QuarticBridge(), "posterior")


def test_one_step_starts_at_the_reference(pair):
    _, x1, _ = pair
    bridge, seen = get_interpolant("bridge"), []

    def network(x, t):
        seen.append((x, t))
        return 2 * x

    assert torch.equal(field_on(bridge, network, "sample").one_step(x1, 1.0, UNTOLD), 2 * x1)
    euler = field_on(bridge, network, "velocity").one_step(x1, 1.0, UNTOLD)  # Euler's step x1 − v(x1, 1)
    assert torch.equal(euler, -x1)
    assert all(torch.equal(x, x1) and (t == 1).all() and t.shape == (len(x1),) for x, t in seen)


def test_field_shows_the_network_its_reference_and_converts_with_it(pair):
    x0, x1, z = pair
    bridge = get_interpolant("bridge", scale=0.5)
    x_t = bridge.interpolate(x0, x1, TIMES, z)

    def network(x, t, condition):
        assert condition.image is x1
        return (x0,)

    scheduler = StochasticInterpolantScheduler(
        interpolant="bridge", interpolant_kwargs={"scale": 0.5}, prediction_type="sample"
    )
    field, told = Field(network, scheduler), Condition(image=x1)
    assert field(x_t, TIMES, told, "sample") is x0
    close(field(x_t, TIMES, told, "velocity"), bridge.velocity(x0, x1, TIMES, z))


class TestRefusals:
    def test_noise_must_be_given(self, pair):
        for method in ("interpolate", "velocity"):
            with pytest.raises(ValueError, match="'bridge' contain γ z: pass z"):
                getattr(BRIDGES[0], method)(*pair[:2], TIMES)

    @every_bridge
    def test_conversions_need_the_reference_or_the_noise(self, bridge, pair):
        x0, x1, z = pair
        for given in ({}, dict(x1=x1, z=z)):
            with pytest.raises(ValueError, match="velocity prediction becomes a sample only with the reference"):
                bridge.convert(x0, x0, TIMES, "velocity", "sample", **given)
        with pytest.raises(ValueError, match=r"\(25, 2, 3, 3\) and the reference or noise \(25, 1, 3, 3\)"):
            bridge.convert(x0, x0, TIMES, "velocity", "sample", x1=x1[:, :1])

    @pytest.mark.parametrize("kind", [kind for kind in PREDICTIONS if kind not in ("velocity", "sample")])
    def test_predictions_of_noise(self, kind, pair):
        x0, x1, _ = pair
        for call in (
            lambda: BRIDGES[0].convert(x0, x0, TIMES, kind, "sample", x1=x1),
            lambda: BRIDGES[0].target(x0, x1, TIMES, kind),
        ):
            with pytest.raises(ValueError, match=f"{kind} prediction needs Gaussian noise.*velocity, sample"):
                call()

    @pytest.mark.parametrize("kind", ["discrete", "log_sigma"])
    def test_timesteps_that_are_noise_levels(self, kind):
        with pytest.raises(ValueError, match=f"timestep_type='{kind}' tells the network a noise level"):
            BRIDGES[0].network_time(TIMES, kind)

    def test_noise_levels(self):
        with pytest.raises(ValueError, match="β/α is no noise level"):
            BRIDGES[0].time_of_ratio(2.5)
        with pytest.raises(ValueError, match="EDM's weight"):
            BRIDGES[0].edm_weight(TIMES)
        for law in TIME_SAMPLERS:
            if law in ("lognormal", "karras"):
                with pytest.raises(ValueError, match=f"{law!r}.*noise levels.*'bridge'"):
                    TimeSampler(law, 0.1, 0.9, interpolant=BRIDGES[0])
            else:
                TimeSampler(law, 0.1, 0.9, interpolant=BRIDGES[0])

    @pytest.mark.parametrize("scale", [-1, math.inf, math.nan, "1"])
    def test_scales(self, scale):
        with pytest.raises(ValueError, match="finite scale >= 0"):
            get_interpolant("bridge", scale=scale)

    def test_start_times_are_the_reference(self):
        for kind in ("velocity", "sample"):
            assert BRIDGES[0].start_time(kind) == BRIDGES[0].default_init_time(kind) == 1.0
