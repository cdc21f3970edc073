"""Coefficients, derivatives and conversions in float64, where identities are exact up to rounding."""

import math

import interpolant_families as families
import pytest
import torch
from helpers import UNTOLD, field_on
from interpolant_families import FAMILIES, PRESERVING, TIMES, double, every_family, exact_predictions, noise

from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, PREDICTIONS, Interpolant, get_interpolant
from si_distill.schedulers.interpolant_solvers import check_determinant


@pytest.fixture
def truth():
    return families.truth()


class Cubic(Interpolant):
    """A new family: everything but this is inherited."""

    name = "cubic"

    def __init__(self, power: float = 3.0):
        self.power = power

    def _path(self, t):
        return 1 - t**self.power, t, -self.power * t ** (self.power - 1), torch.ones_like(t)


class Still(Cubic):
    """β/α does not grow for a while: α β' − α' β = 0 at t = 1/2."""

    name = "still"

    def _path(self, t):
        s, ds = 4 * (t - 0.5) ** 3 + 0.5, 12 * (t - 0.5) ** 2
        return 1 - s, s, -ds, ds


class Slipped(Cubic):
    name = "slipped"

    def _path(self, t):
        alpha, beta, d_alpha, d_beta = super()._path(t)
        return alpha, beta, d_alpha / self.power, d_beta


class Broken(Cubic):
    name = "broken"

    def _path(self, t):
        alpha, beta, d_alpha, d_beta = super()._path(t)
        return alpha, torch.where((t > 0.4) & (t < 0.6), torch.nan, beta), d_alpha, d_beta


@every_family
def test_families_pass_the_check_of_their_path(name, config):
    check_determinant(get_interpolant(name, **config), 0.3)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Still, "α β' − α' β = 0 at t = 0.5"),
        (Slipped, "gives alpha' = .*, where alpha grows by .*: `_path` or `_gamma` does not return the derivative"),
        (Broken, "has values of α, β or γ at t = 0.40.* that are not finite"),
    ],
)
def test_paths_that_cannot_be_sampled_are_refused(family, words):
    check_determinant(Cubic(), 0.3)
    with pytest.raises(ValueError, match=words):
        check_determinant(family(), 0.3)


class TestCoefficients:
    @every_family
    def test_derivatives_are_those_of_autograd(self, name, config):
        it = get_interpolant(name, **config)
        t = TIMES.clone().requires_grad_()
        c = it.coefficients(t)
        for value, derivative in ((c.alpha, c.d_alpha), (c.beta, c.d_beta)):
            # α of `edm` is constant.
            expected = torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else 0 * t
            torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)

    @every_family
    def test_data_at_0_and_reference_at_1(self, name, config):
        c = get_interpolant(name, **config).coefficients(double(0, 1))
        if name == "edm":
            assert torch.equal(c.alpha, double(1, 1))
            first, last = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
            torch.testing.assert_close(c.beta, double(first, last), rtol=1e-13, atol=0)
            return
        # The first level of a discrete schedule already has noise.
        assert c.beta[0] == 0 or (name == "ddpm" and c.beta[0] < 0.06)
        assert c.alpha[0] == pytest.approx(math.sqrt(1 - c.beta[0] ** 2), rel=1e-14)
        assert c.alpha[1] < 0.15
        assert c.beta[1] > 0.98

    @every_family
    def test_signal_to_noise_falls(self, name, config):
        c = get_interpolant(name, **config).coefficients(TIMES)
        assert (c.determinant > 0).all()
        assert ((c.alpha / c.beta).diff() < 0).all()
        torch.testing.assert_close(c.kappa, c.d_alpha - c.d_beta * c.alpha / c.beta, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("name", "config"), PRESERVING)
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
        for name in GAUSSIAN_INTERPOLANTS:
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
            rounding = dict(rtol=1e-11, atol=1e-11) if space == "edm" else dict(rtol=0, atol=0)
            torch.testing.assert_close(it.target(*truth, TIMES, space), expected, **rounding)

    def test_refuses_a_target_it_does_not_know(self, truth):
        with pytest.raises(ValueError, match="velocity, sample, epsilon, score, v_prediction, edm"):
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
        complete = ("velocity", "sample", "edm")
        for source in complete:
            for target in (*complete, "epsilon", "score"):
                assert it.convert(prediction, x, double(1), source, target).isfinite().all()
        assert it.network_input(x, double(1), "edm").isfinite().all()
        assert it.edm_weight(double(1)).isfinite().all()
        assert it.target(x, prediction, double(0), "edm").isfinite().all()
        assert it.convert(prediction, x, double(0), "edm", "epsilon").isfinite().all()

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

        x0 = field_on(get_interpolant("linear"), network).one_step(x1, 1.0, UNTOLD)
        torch.testing.assert_close(x0, x1 - 2 * torch.sin(x1), rtol=1e-14, atol=1e-14)
        ((seen, times),) = calls
        assert torch.equal(seen, x1)
        assert torch.equal(times, double(1, 1, 1))

    @every_family
    @pytest.mark.parametrize("source", PREDICTIONS)
    def test_is_the_same_map_in_every_parameterisation(self, name, config, source):
        it, x1, t = get_interpolant(name, **config), noise(0, 3, 2), 0.7
        times = torch.full((3,), t, dtype=torch.float64)
        x_t = it.at(times, x1).beta * x1

        def network(network_input, t):
            assert torch.equal(network_input, it.network_input(x_t, t, source))
            return it.convert(torch.tanh(x_t), x_t, t, "sample", source)

        torch.testing.assert_close(
            field_on(it, network, source).one_step(x1, t, UNTOLD), torch.tanh(x_t), rtol=1e-9, atol=1e-9
        )

    def test_gives_float32_times_and_returns_the_dtype_of_the_noise(self):
        seen = []

        def network(x, t):
            seen.append((x.dtype, t.dtype))
            return x.float()

        x1 = noise(0, 3, 2).bfloat16()
        assert field_on(get_interpolant("vp"), network, "sample").one_step(x1, 0.5, UNTOLD).dtype == torch.bfloat16
        assert seen == [(torch.bfloat16, torch.float32)]


class TestIdentity:
    @every_family
    def test_name_and_config_rebuild_it(self, name, config):
        it = get_interpolant(name, **config)
        again = get_interpolant(it.name, **it.config)
        assert again == it
        assert hash(again) == hash(it)
        assert eval(repr(it), {"get_interpolant": get_interpolant}) == it

    def test_differs_by_family_and_by_setting(self):
        several = {get_interpolant(name, **config) for name, config in FAMILIES.values()}
        assert len(several) == len(FAMILIES)
        assert get_interpolant("vp", b0=1, b1=2) == get_interpolant("vp", b0=1.0, b1=2.0)
        assert get_interpolant("linear") != "linear"

    def test_refuses_an_unknown_name_with_the_choices(self):
        with pytest.raises(ValueError, match=r"Unknown interpolant 'cosine'.*linear, trigonometric, vp, ddpm, edm"):
            get_interpolant("cosine")

    def test_config_is_plain_scalars_also_after_use(self):
        for it in map(get_interpolant, GAUSSIAN_INTERPOLANTS):
            it.coefficients(TIMES)
            assert all(type(value) in (int, float, str) for value in it.config.values())

    @pytest.mark.parametrize(
        ("name", "config", "message"),
        [
            ("ddpm", dict(beta_schedule="sigmoid"), "'sigmoid'.*linear, scaled_linear, squaredcos_cap_v2"),
            ("ddpm", dict(num_train_timesteps=1), "num_train_timesteps=1"),
            ("ddpm", dict(num_train_timesteps=10.5), "num_train_timesteps=10.5"),
            ("ddpm", dict(beta_start=0.1), "beta_start=0.1 and beta_end=0.02"),
            ("ddpm", dict(beta_end=1.0), "beta_end=1.0"),
            ("edm", dict(sigma_min=0.0), "'sigma_min': 0.0"),
            ("edm", dict(sigma_max=0.001), "'sigma_max': 0.001"),
            ("edm", dict(rho=0), "'rho': 0.0"),
            ("edm", dict(sigma_data=-1), "'sigma_data': -1.0"),
        ],
    )
    def test_refuses_settings_that_cannot_work(self, name, config, message):
        with pytest.raises(ValueError, match=message):
            get_interpolant(name, **config)

    @pytest.mark.parametrize("name", ["linear", "vp"])
    def test_refuses_settings_it_does_not_have(self, name):
        with pytest.raises(ValueError, match=f"'{name}' has no setting `beta_start`"):
            get_interpolant(name, beta_start=0.1)

    @pytest.mark.parametrize(("b0", "b1"), [(20.0, 0.1), (1.0, 1.0), (0.0, 20.0), (-1.0, 2.0)])
    def test_vp_needs_rising_rates(self, b0, b1):
        with pytest.raises(ValueError, match=f"b0={b0} and b1={b1}"):
            get_interpolant("vp", b0=b0, b1=b1)
