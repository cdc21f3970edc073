"""Noise levels of the interpolants: discrete schedules, EDM's preconditioning, and times from β/α, in float64."""

import math

import interpolant_families as families
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import UNTOLD, field_on
from interpolant_families import TIMES, double, edm_preconditioning, every_family, noise

from si_distill.interpolants import PREDICTIONS, VPInterpolant, get_interpolant


@pytest.fixture
def truth():
    return families.truth()


class TestDDPM:
    @pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    @pytest.mark.parametrize(("steps", "start", "end"), [(1000, 1e-4, 0.02), (50, 0.00085, 0.012)])
    def test_ddpm_has_the_values_of_diffusers(self, schedule, steps, start, end):
        settings = dict(num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule=schedule)
        c = get_interpolant("ddpm", **settings).coefficients(torch.arange(steps, dtype=torch.float64) / (steps - 1))
        expected = DDPMScheduler(**settings).alphas_cumprod
        assert torch.equal((c.alpha**2).float(), expected)
        torch.testing.assert_close(c.beta**2, 1 - expected.double(), rtol=1e-11, atol=0)

    def test_ddpm_is_linear_in_log_snr_between_its_steps(self):
        it = get_interpolant("ddpm", num_train_timesteps=5)
        c = it.coefficients(double(0.5, 0.6, 0.65, 0.75))
        log_snr = 2 * (c.alpha / c.beta).log()
        torch.testing.assert_close(log_snr.diff() / double(0.1, 0.05, 0.1), (log_snr[3] - log_snr[0]).expand(3) / 0.25)
        # At a step the derivative is that of the piece which begins there; at t = 1 of the one which ends.
        inside, step = it.coefficients(double(0.5 + 1e-9, 1 - 1e-9)), it.coefficients(double(0.5, 1))
        torch.testing.assert_close(step.d_beta, inside.d_beta, rtol=1e-6, atol=0)

    def test_a_table_made_in_inference_mode_serves_training(self):
        with torch.inference_mode():
            it = get_interpolant("ddpm", num_train_timesteps=17)
            it.coefficients(double(0.3))
        t = double(0.3).requires_grad_()
        assert torch.autograd.grad(it.coefficients(t).alpha.sum(), t)[0].isfinite().all()


class TestEDM:
    @every_family
    def test_prediction_and_input_are_edms_preconditioning(self, name, config, truth):
        # x̂0 = c_skip x + c_out F(c_in x) in EDM's own variables x = x_t / α, σ = β / α.
        it, (x_t, raw) = get_interpolant(name, **config), truth
        x = x_t / it.at(TIMES, x_t).alpha
        c_skip, c_out, c_in = edm_preconditioning(it, TIMES)
        x0 = it.convert(raw, x_t, TIMES, "edm", "sample")
        torch.testing.assert_close(x0, c_skip * x + c_out * raw, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(it.network_input(x_t, TIMES, "edm"), c_in * x, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("prediction", ["velocity", "sample", "epsilon", "score"])
    def test_other_networks_see_the_state_itself(self, prediction):
        x = noise(0, 2, 3)
        assert get_interpolant("edm").network_input(x, double(0.5), prediction) is x

    @every_family
    def test_least_squares_on_the_raw_output_is_the_weighted_denoising_loss(self, name, config, truth):
        it, raw = get_interpolant(name, **config), noise(2, *truth[0].shape)
        x0 = it.convert(raw, it.interpolate(*truth, TIMES), TIMES, "edm", "sample")
        denoising = (x0 - truth[0]).square().sum((1, 2, 3))
        raw_error = (raw - it.target(*truth, TIMES, "edm")).square().sum((1, 2, 3))
        torch.testing.assert_close(it.edm_weight(TIMES) * denoising, raw_error, rtol=1e-9, atol=0)

    @every_family
    def test_weight_is_the_published_one(self, name, config):
        it = get_interpolant(name, **config)
        c = it.coefficients(TIMES)
        sigma, data = c.beta / c.alpha, it.sigma_data
        torch.testing.assert_close(it.edm_weight(TIMES), (sigma**2 + data**2) / (sigma * data) ** 2, rtol=1e-11, atol=0)

    def test_on_linear_at_1_is_the_scaled_output(self):
        it, x, raw = get_interpolant("linear"), noise(0, 1, 4), noise(1, 1, 4)
        torch.testing.assert_close(it.convert(raw, x, double(1), "edm", "sample"), 0.5 * raw)
        assert torch.equal(it.network_input(x, double(1), "edm"), x)

    @every_family
    def test_one_step_scales_the_input_once(self, name, config):
        it, x1, seen = get_interpolant(name, **config), noise(0, 3, 2), []
        field_on(it, lambda x, t: seen.append(x) or x, "edm").one_step(x1, 0.6, UNTOLD)
        c = it.coefficients(double(0.6))
        expected = c.beta * x1 / (c.beta**2 + c.alpha**2 * it.sigma_data**2).sqrt()
        torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=0)

    def test_map_of_times_is_that_of_karras(self):
        u = torch.linspace(0, 1, 18, dtype=torch.float64)
        sigma = (80 ** (1 / 7) + (1 - u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        torch.testing.assert_close(get_interpolant("edm").coefficients(u).beta, sigma, rtol=1e-13, atol=0)


class TestTimeOfRatio:
    def test_closed_forms(self):
        assert get_interpolant("linear").time_of_ratio(2.5) == pytest.approx(2.5 / 3.5, rel=1e-14)
        expected = math.atan(2.5) / (math.pi / 2)
        assert get_interpolant("trigonometric").time_of_ratio(2.5) == pytest.approx(expected, rel=1e-14)
        # vp: α² = 1 / (1 + 2.5²), and −log α is a quadratic in t.
        a, b, c = 0.25 * 19.9, 0.05, -0.5 * math.log(1 + 2.5**2)
        assert VPInterpolant().time_of_ratio(2.5) == pytest.approx((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))

    @every_family
    @pytest.mark.parametrize("ratio", [0.05, 1.0, 6.0])
    def test_inverts_beta_over_alpha(self, name, config, ratio):
        it = get_interpolant(name, **config)
        c = it.coefficients(double(it.time_of_ratio(ratio)))
        torch.testing.assert_close(c.beta / c.alpha, double(ratio), rtol=1e-12, atol=0)

    @every_family
    def test_inverts_many_at_once(self, name, config):
        it = get_interpolant(name, **config)
        t = torch.linspace(0.03, 0.97, 40, dtype=torch.float64).reshape(4, 10)
        c = it.coefficients(t)
        torch.testing.assert_close(it.times_of_ratios(c.beta / c.alpha), t, rtol=0, atol=1e-10)
        single = it.times_of_ratios((c.beta / c.alpha).float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), t, rtol=0, atol=1e-5)

    @every_family
    def test_reaches_both_ends(self, name, config):
        it = get_interpolant(name, **config)
        c = it.coefficients(double(0, 1))
        for end, ratio in enumerate(c.beta / c.alpha):
            if 0 < ratio < 1e6:
                for value in (ratio, ratio.float()):
                    assert float(it.times_of_ratios(value)) == pytest.approx(end, abs=1e-6)

    @pytest.mark.parametrize(
        ("name", "ratio"),
        [
            ("vp", 200.0),
            ("vp", 0.0),
            ("linear", -1.0),
            ("edm", 0.0019),
            ("edm", 80.1),
            ("ddpm", 0.009),
            ("ddpm", 200.0),
        ],
    )
    def test_refuses_a_ratio_out_of_reach(self, name, ratio):
        with pytest.raises(ValueError, match=f"{ratio} is not reached"):
            get_interpolant(name).time_of_ratio(ratio)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_sampling_and_students_start_where_the_prediction_has_a_sample(self, prediction):
        for name in ("vp", "ddpm", "edm"):
            it = get_interpolant(name)
            assert it.default_init_time(prediction) == it.time_of_ratio(2.5)
            assert it.start_time(prediction) == 1
        for name in ("linear", "trigonometric"):
            it = get_interpolant(name)
            direct = prediction not in ("epsilon", "score")
            assert it.reaches_sample(1.0, prediction) == direct
            assert it.start_time(prediction) == (1 if direct else it.time_of_ratio(80.0))
            assert it.default_init_time(prediction) == (1 if direct else it.time_of_ratio(2.5))
            assert it.reaches_sample(it.start_time(prediction), prediction)

    def test_a_schedule_that_ends_before_the_students_ratio_starts_them_at_its_end(self):
        for it in (get_interpolant("edm", sigma_max=2.0), get_interpolant("ddpm", num_train_timesteps=100)):
            assert it.default_init_time("sample") == 1
