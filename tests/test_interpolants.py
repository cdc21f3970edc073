"""Coefficients, derivatives and conversions in float64, where identities are exact up to rounding."""

import math

import pytest
import torch

from si_distill.interpolants import INTERPOLANTS, PREDICTIONS, Interpolant, VPInterpolant, get_interpolant

FAMILIES = [("linear", {}), ("trigonometric", {}), ("vp", {}), ("vp", dict(b0=0.5, b1=8.0))]
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)

every_family = pytest.mark.parametrize(("name", "config"), FAMILIES, ids=["linear", "trigonometric", "vp", "vp-other"])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def truth():
    """x0 and x1 at 25 times, as small images."""
    return noise(0, len(TIMES), 2, 3, 3), noise(1, len(TIMES), 2, 3, 3)


def exact_predictions(it: Interpolant, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """What perfect networks say when (x0, x1) is known."""
    beta = it.at(t, x0).beta
    return {"velocity": it.velocity(x0, x1, t), "sample": x0, "epsilon": x1, "score": -x1 / beta}


class Cubic(Interpolant):
    """A new family: everything but this is inherited."""

    name = "cubic"

    def __init__(self, power: float = 3.0):
        self.power = power

    def _path(self, t):
        return 1 - t**self.power, t, -self.power * t ** (self.power - 1), torch.ones_like(t)


class TestCoefficients:
    @every_family
    def test_derivatives_are_those_of_autograd(self, name, config):
        it = get_interpolant(name, **config)
        t = TIMES.clone().requires_grad_()
        c = it.coefficients(t)
        for value, derivative in ((c.alpha, c.d_alpha), (c.beta, c.d_beta)):
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)

    @every_family
    def test_data_at_0_and_reference_at_1(self, name, config):
        c = get_interpolant(name, **config).coefficients(double(0, 1))
        torch.testing.assert_close(c.alpha[0], double(1)[0], rtol=0, atol=0)
        assert c.beta[0] == 0
        assert c.alpha[1] < 0.15
        assert c.beta[1] > 0.98

    def test_end_values_of_each_family(self):
        alpha = {n: float(get_interpolant(n).coefficients(double(1)).alpha) for n in INTERPOLANTS}
        assert alpha["linear"] == 0
        assert alpha["trigonometric"] == pytest.approx(0, abs=1e-15)
        assert alpha["vp"] == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-14)

    @every_family
    def test_signal_to_noise_falls(self, name, config):
        c = get_interpolant(name, **config).coefficients(TIMES)
        assert (c.determinant > 0).all()
        assert ((c.alpha / c.beta).diff() < 0).all()
        torch.testing.assert_close(c.kappa, c.d_alpha - c.d_beta * c.alpha / c.beta, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("name", "config"), FAMILIES[1:])
    def test_variance_is_preserved(self, name, config):
        c = get_interpolant(name, **config).coefficients(TIMES)
        torch.testing.assert_close(c.alpha**2 + c.beta**2, torch.ones_like(TIMES), rtol=1e-14, atol=0)

    @every_family
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_are_computed_in_float64_and_cast_last(self, name, config, dtype):
        it = get_interpolant(name, **config)
        t = torch.linspace(0.001, 1, 40).to(dtype).reshape(4, 10)
        given, exact = it.coefficients(t), it.coefficients(t.double())
        for field in ("alpha", "beta", "gamma", "d_alpha", "d_beta", "d_gamma"):
            value = getattr(given, field)
            assert value.dtype == dtype
            assert value.shape == t.shape
            assert torch.equal(value, getattr(exact, field).to(dtype))

    def test_beta_of_vp_keeps_its_digits_near_0(self):
        # sqrt(1 − α²) of the rounded α would be 0 here; β² = b0 t to first order.
        beta = get_interpolant("vp").coefficients(torch.tensor([1e-9])).beta
        assert float(beta) == pytest.approx(math.sqrt(1e-10), rel=1e-5)

    def test_have_no_noise_term(self):
        c = get_interpolant("linear").coefficients(TIMES)
        assert not c.gamma.any()
        assert not c.d_gamma.any()

    def test_singular_ends_are_where_a_derivative_is_infinite(self):
        for name in INTERPOLANTS:
            it = get_interpolant(name)
            c = it.coefficients(double(0, 1))
            infinite = ~(c.d_alpha.isfinite() & c.d_beta.isfinite())
            assert tuple(double(0, 1)[infinite].tolist()) == it.singular_ends

    def test_refuse_integer_times(self):
        it, x = get_interpolant("linear"), noise(0, 2, 1)
        with pytest.raises(TypeError, match="floating point"):
            it.coefficients(torch.tensor([0, 1]))
        with pytest.raises(TypeError, match="floating point"):
            it.interpolate(x, x, torch.tensor([0, 999]))

    def test_times_must_fit_the_batch(self):
        it, x = get_interpolant("linear"), noise(0, 4, 1, 2, 2)
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            it.interpolate(x, x, torch.rand(3))
        with pytest.raises(ValueError, match=r"\(4, 1\)"):
            it.interpolate(x, x, torch.rand(4, 1))
        for t in (torch.tensor(0.25), torch.tensor([0.25])):
            torch.testing.assert_close(it.interpolate(x, x, t), x)


class TestInterpolation:
    @every_family
    def test_velocity_is_the_time_derivative_of_the_path(self, name, config, truth):
        it = get_interpolant(name, **config)
        _, velocity = torch.func.jvp(lambda t: it.interpolate(*truth, t), (TIMES,), (torch.ones_like(TIMES),))
        torch.testing.assert_close(it.velocity(*truth, TIMES), velocity, rtol=1e-10, atol=1e-10)

    @every_family
    def test_targets_are_what_perfect_networks_say(self, name, config, truth):
        it = get_interpolant(name, **config)
        for space, expected in exact_predictions(it, *truth, TIMES).items():
            torch.testing.assert_close(it.target(*truth, TIMES, space), expected, rtol=0, atol=0)

    def test_refuses_a_target_it_does_not_know(self, truth):
        with pytest.raises(ValueError, match="velocity, sample, epsilon, score"):
            get_interpolant("linear").target(*truth, TIMES, "noise")

    def test_low_precision_samples_keep_precise_times(self):
        # bfloat16 has no number between 0.99609375 and 1: t = 0.998 must not become 1 before α is known.
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        x_t = get_interpolant("linear").interpolate(x, 0 * x, torch.tensor([0.998]))
        assert x_t.dtype == torch.bfloat16
        assert float(x_t) == pytest.approx(0.002, rel=0.01)


class TestConvert:
    @every_family
    @pytest.mark.parametrize("source", PREDICTIONS)
    @pytest.mark.parametrize("target", PREDICTIONS)
    def test_agrees_with_the_truth(self, name, config, source, target, truth):
        it = get_interpolant(name, **config)
        exact = exact_predictions(it, *truth, TIMES)
        converted = it.convert(exact[source], it.interpolate(*truth, TIMES), TIMES, source, target)
        torch.testing.assert_close(converted, exact[target], rtol=1e-9, atol=1e-10)

    @every_family
    @pytest.mark.parametrize("source", PREDICTIONS)
    @pytest.mark.parametrize("target", PREDICTIONS)
    def test_round_trips_for_any_prediction(self, name, config, source, target, truth):
        it = get_interpolant(name, **config)
        x_t, prediction = truth
        there = it.convert(prediction, x_t, TIMES, source, target)
        torch.testing.assert_close(it.convert(there, x_t, TIMES, target, source), prediction, rtol=1e-9, atol=1e-9)

    @every_family
    def test_velocity_error_is_kappa_times_denoising_error(self, name, config, truth):
        it = get_interpolant(name, **config)
        x_t, velocity = it.interpolate(*truth, TIMES), noise(2, *truth[0].shape)
        x0 = it.convert(velocity, x_t, TIMES, "velocity", "sample")
        kappa = it.coefficients(TIMES).kappa[:, None, None, None]
        torch.testing.assert_close(velocity - it.velocity(*truth, TIMES), kappa * (x0 - truth[0]), rtol=1e-9, atol=1e-9)

    @every_family
    def test_is_finite_at_the_ends_where_it_is_defined(self, name, config):
        it = get_interpolant(name, **config)
        x, prediction = noise(0, 1, 4), noise(1, 1, 4)
        for source, target in (("sample", "velocity"), ("velocity", "sample"), ("velocity", "epsilon")):
            assert it.convert(prediction, x, double(1), source, target).isfinite().all()

    @pytest.mark.parametrize("family", [Cubic(), Cubic(power=2.0)])
    def test_works_for_a_new_family_of_a_dozen_lines(self, family, truth):
        exact = exact_predictions(family, *truth, TIMES)
        x_t = family.interpolate(*truth, TIMES)
        for source in PREDICTIONS:
            for target in PREDICTIONS:
                converted = family.convert(exact[source], x_t, TIMES, source, target)
                torch.testing.assert_close(converted, exact[target], rtol=1e-8, atol=1e-8)
        assert family.config == {"power": family.power}
        assert family == Cubic(power=family.power)

    def test_refuses_shapes_that_would_broadcast(self):
        with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
            get_interpolant("linear").convert(noise(0, 2, 1), noise(0, 2, 3), double(0.5), "velocity", "sample")

    @pytest.mark.parametrize(("source", "target"), [("v", "sample"), ("sample", "v")])
    def test_refuses_an_unknown_prediction(self, source, target):
        x = noise(0, 2, 3)
        with pytest.raises(ValueError, match=r"Unknown prediction 'v'.*velocity, sample, epsilon, score"):
            get_interpolant("linear").convert(x, x, double(0.5), source, target)


class TestOneStep:
    def test_is_one_euler_step_on_linear_and_calls_the_network_once(self):
        x1, calls = noise(0, 3, 2), []

        def network(x, t):
            calls.append((x, t))
            return torch.sin(x) * (1 + t[:, None])

        x0 = get_interpolant("linear").one_step(network, x1, 1.0, "velocity")
        torch.testing.assert_close(x0, x1 - 2 * torch.sin(x1), rtol=1e-14, atol=1e-14)
        ((seen, times),) = calls
        assert torch.equal(seen, x1)
        assert torch.equal(times, double(1, 1, 1))

    @every_family
    @pytest.mark.parametrize("source", PREDICTIONS)
    def test_is_the_same_map_in_every_parameterisation(self, name, config, source):
        it, x1, t = get_interpolant(name, **config), noise(0, 3, 2), 0.7
        times = torch.full((3,), t, dtype=torch.float64)
        beta = it.at(times, x1).beta

        def network(x, t):
            return it.convert(torch.tanh(x), x, t, "sample", source)

        torch.testing.assert_close(it.one_step(network, x1, t, source), torch.tanh(beta * x1), rtol=1e-9, atol=1e-9)

    def test_gives_float32_times_and_returns_the_dtype_of_the_noise(self):
        seen = []

        def network(x, t):
            seen.append((x.dtype, t.dtype))
            return x.float()

        x1 = noise(0, 3, 2).bfloat16()
        assert get_interpolant("vp").one_step(network, x1, 0.5, "sample").dtype == torch.bfloat16
        assert seen == [(torch.bfloat16, torch.float32)]


class TestTimeOfRatio:
    def test_closed_forms(self):
        assert get_interpolant("linear").time_of_ratio(2.5) == pytest.approx(2.5 / 3.5, rel=1e-14)
        expected = math.atan(2.5) / (math.pi / 2)
        assert get_interpolant("trigonometric").time_of_ratio(2.5) == pytest.approx(expected, rel=1e-14)
        # vp: α² = 1 / (1 + 2.5²), and −log α is a quadratic in t.
        a, b, c = 0.25 * 19.9, 0.05, -0.5 * math.log(1 + 2.5**2)
        assert VPInterpolant().time_of_ratio(2.5) == pytest.approx((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))

    @every_family
    @pytest.mark.parametrize("ratio", [0.01, 1.0, 6.0])
    def test_inverts_beta_over_alpha(self, name, config, ratio):
        it = get_interpolant(name, **config)
        c = it.coefficients(double(it.time_of_ratio(ratio)))
        torch.testing.assert_close(c.beta / c.alpha, double(ratio), rtol=1e-12, atol=0)

    @pytest.mark.parametrize(("name", "ratio"), [("vp", 200.0), ("vp", 0.0), ("linear", -1.0)])
    def test_refuses_a_ratio_out_of_reach(self, name, ratio):
        with pytest.raises(ValueError, match=f"{ratio} is not reached"):
            get_interpolant(name).time_of_ratio(ratio)

    @pytest.mark.parametrize("prediction", ["velocity", "sample", "epsilon", "score"])
    def test_sampling_and_students_start_where_the_prediction_has_a_sample(self, prediction):
        vp = get_interpolant("vp")
        assert vp.default_init_time(prediction) == vp.time_of_ratio(2.5)
        assert vp.start_time(prediction) == 1
        for name in ("linear", "trigonometric"):
            it = get_interpolant(name)
            direct = prediction in ("velocity", "sample")
            assert it.reaches_sample(1.0, prediction) == direct
            assert it.start_time(prediction) == (1 if direct else it.time_of_ratio(80.0))
            assert it.default_init_time(prediction) == (1 if direct else it.time_of_ratio(2.5))
            assert it.reaches_sample(it.start_time(prediction), prediction)


class TestIdentity:
    @every_family
    def test_name_and_config_rebuild_it(self, name, config):
        it = get_interpolant(name, **config)
        again = get_interpolant(it.name, **it.config)
        assert again == it
        assert hash(again) == hash(it)
        assert eval(repr(it), {"get_interpolant": get_interpolant}) == it

    def test_differs_by_family_and_by_setting(self):
        several = {get_interpolant(name, **config) for name, config in FAMILIES}
        assert len(several) == len(FAMILIES)
        assert get_interpolant("vp", b0=1, b1=2) == get_interpolant("vp", b0=1.0, b1=2.0)
        assert get_interpolant("linear") != "linear"

    def test_refuses_an_unknown_name_with_the_choices(self):
        with pytest.raises(ValueError, match=r"Unknown interpolant 'cosine'.*linear, trigonometric, vp"):
            get_interpolant("cosine")

    @pytest.mark.parametrize("name", ["linear", "vp"])
    def test_refuses_settings_it_does_not_have(self, name):
        with pytest.raises(ValueError, match=f"'{name}' does not take the settings .*beta_start"):
            get_interpolant(name, beta_start=0.1)

    @pytest.mark.parametrize(("b0", "b1"), [(20.0, 0.1), (1.0, 1.0), (0.0, 20.0), (-1.0, 2.0)])
    def test_vp_needs_rising_rates(self, b0, b1):
        with pytest.raises(ValueError, match=f"b0={b0} and b1={b1}"):
            get_interpolant("vp", b0=b0, b1=b1)
