"""The step rules: orders of convergence, exactness, and SDEs that keep the marginals, on exact fields of Gaussian data."""

import itertools

import pytest
import torch
from gaussian_oracle import Gaussian

from si_distill import StochasticInterpolantScheduler, get_interpolant
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS
from si_distill.schedulers.interpolant_solvers import DIFFUSION_FORMS

DATA = Gaussian(*torch.tensor([[-0.5, 0.3, 1.0], [0.4, 1.0, 1.6]], dtype=torch.float64))

every_interpolant = pytest.mark.parametrize("interpolant", GAUSSIAN_INTERPOLANTS)
every_form = pytest.mark.parametrize("form", DIFFUSION_FORMS)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler(interpolant="linear", solver=None, steps=None, **config) -> StochasticInterpolantScheduler:
    sched = StochasticInterpolantScheduler(interpolant=interpolant, solver=solver, **config)
    if steps:
        sched.set_timesteps(steps)
    return sched


def run(sched, x, law=DATA, noises=None, evaluations=None):
    """All steps from the state `x`, or some; `noises` are those of the draws in their order, (draws, *x.shape)."""
    draws = iter(() if noises is None else noises)
    for i, t in enumerate(sched.timesteps[:evaluations]):
        v = law.velocity(sched.interpolant, x, t.double().reshape(1))
        drawn = noises is not None and i % sched.order == 0
        x = sched.step(v, t, x, variance_noise=next(draws, None) if drawn else None).prev_sample
    return x


def flow_error(interpolant, solver, steps, law=DATA):
    sched = scheduler(interpolant, solver, steps)
    x = sched.init_noise_sigma * noise(0, 32, len(law.mean))
    exact = law.flow_to_data(sched.interpolant, x, sched.timesteps[:1].double())
    return float((run(sched, x, law) - exact).abs().max())


def moments(sched, law=DATA, mean=0.0, std=None, evaluations=None):
    """Exact mean and standard deviation after the steps, of starting states N(mean, std²): the sampler is an affine map.

    A row of the batch is a direction: none, the starting state's noise, and the draw of each step. By default the start is
    the sampler's own and it runs to the end.
    """
    draws = sched.num_inference_steps
    x = torch.zeros(2 + draws, len(law.mean), dtype=torch.float64) + mean
    x[1] += sched.init_noise_sigma if std is None else std
    noises = torch.zeros(draws, *x.shape, dtype=torch.float64)
    noises[torch.arange(draws), 2 + torch.arange(draws)] = 1.0
    end = run(sched, x, law, noises, evaluations)
    return end[0], (end[1:] - end[0]).square().sum(0).sqrt()


class TestOrders:
    @pytest.mark.parametrize(
        ("interpolant", "solver", "low", "high"),
        [
            *((name, "ddim", 1.85, 2.2) for name in GAUSSIAN_INTERPOLANTS),
            ("edm", "edm_heun", 3.7, 4.6),
            *((name, "dpmpp_2m", 3.0, 7.0) for name in GAUSSIAN_INTERPOLANTS),
        ],
    )
    def test_of_the_ode_solvers(self, interpolant, solver, low, high):
        errors = [flow_error(interpolant, solver, steps) for steps in (32, 64)]
        assert low < errors[0] / errors[1] < high

    def test_on_edm_the_rules_in_sigma_are_far_better_than_those_in_t(self):
        ddim, euler = (flow_error("edm", solver, 64) for solver in ("ddim", "euler"))
        assert ddim < 0.2 * euler
        assert flow_error("edm", "edm_heun", 32) < 0.4 * flow_error("edm", "heun", 32)
        assert flow_error("edm", "dpmpp_2m", 64) < 0.1 * ddim

    @every_interpolant
    @pytest.mark.parametrize("solver", ["ddim", "edm_heun", "dpmpp_2m"])
    def test_exact_on_a_point_from_anywhere(self, interpolant, solver):
        # On a point mass (x̂0, x̂1) is constant along the flow, so that each step lands on it exactly.
        law = Gaussian(DATA.mean, torch.zeros(3, dtype=torch.float64))
        sched = scheduler(interpolant, solver, 3)
        x1 = noise(0, 5, 3)
        x = sched.interpolant.interpolate(DATA.mean.expand(5, 3), x1, sched.timesteps[:1].double())
        for t, index in zip(sched.timesteps, range(len(sched.timesteps)), strict=True):
            x = sched.step(law.velocity(sched.interpolant, x, t.double().reshape(1)), t, x).prev_sample
            to = sched._times[index // sched.order + 1].double().reshape(1)
            expected = DATA.mean if index == len(sched.timesteps) - 1 else None
            if expected is None:
                expected = sched.interpolant.interpolate(DATA.mean.expand(5, 3), x1, to)
            torch.testing.assert_close(x, expected.expand(5, 3), rtol=1e-5, atol=1e-4)  # float32 times

    def test_edm_heun_is_the_algorithm_of_its_paper(self):
        # Karras et al. 2022, algorithm 1: d = (x − x̂0)/σ, on noise levels of table 1 with the last step to 0.
        grid = torch.linspace(1, 0, 10, dtype=torch.float64)
        sched = scheduler("edm", "edm_heun")
        sched.set_timesteps(timesteps=grid)
        sigmas = [*((0.002 ** (1 / 7) + grid * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7).tolist(), 0.0]
        x = y = 80.0 * noise(0, 4, 3)
        for now, to in itertools.pairwise(sigmas):
            slopes = []
            for sigma, state in ((now, lambda: y), (to, lambda: y + (to - now) * slopes[0])):  # noqa: B023
                if sigma > 0:
                    x0 = DATA.mean + DATA.std**2 / (DATA.std**2 + sigma**2) * (state() - DATA.mean)
                    slopes.append((state() - x0) / sigma)
            y = y + (to - now) * sum(slopes) / len(slopes)
        torch.testing.assert_close(run(sched, x), y, rtol=1e-5, atol=1e-4)  # times of the scheduler are float32


class TestDiffusion:
    @every_interpolant
    @every_form
    def test_has_its_formula(self, interpolant, form):
        it, t = get_interpolant(interpolant), torch.tensor(0.3, dtype=torch.float64)
        c = it.coefficients(t)
        expected = {
            "sigma": c.beta,
            "linear": t,
            "sbdm": c.beta * (c.alpha * c.d_beta - c.d_alpha * c.beta) / c.alpha,
            "constant": 1.0,
            "decreasing": 0.25 * (torch.cos(torch.pi * (1 - t)) + 1) ** 2,
            "increasing-decreasing": torch.sin(torch.pi * t) ** 2,
        }
        sched = scheduler(interpolant, "sde_euler", diffusion_form=form, diffusion_norm=0.7)
        assert float(sched.diffusion(t, c)) == pytest.approx(0.7 * float(expected[form]), rel=1e-12)

    def test_sbdm_on_vp_is_the_diffusion_of_its_forward_sde(self):
        # Song et al. 2021, eq. 32: dx = −½ b(t) x dt + √b(t) dw with b linear; 2 d = b.
        t = torch.tensor(0.4, dtype=torch.float64)
        sched = scheduler("vp", "sde_euler", diffusion_form="sbdm")
        d = sched.diffusion(t, sched.interpolant.coefficients(t))
        assert 2 * float(d) == pytest.approx(0.1 + 0.4 * 19.9, rel=1e-12)

    @pytest.mark.parametrize(("solver", "low", "high"), [("sde_euler", 1.8, 2.3), ("sde_heun", 3.3, 5.0)])
    @pytest.mark.parametrize(
        ("interpolant", "form"),
        [
            *(("vp", form) for form in DIFFUSION_FORMS),
            *(("linear", form) for form in DIFFUSION_FORMS if form != "sbdm"),
            ("trigonometric", "sigma"),
            ("ddpm", "sbdm"),
        ],
    )
    def test_keeps_the_marginals(self, interpolant, form, solver, low, high):
        # From the law of x_t at 0.9 to that at 0.05; what is left is the error of the steps, of weak order 1 and 2.
        errors = []
        for steps in (25, 49):
            sched = scheduler(interpolant, solver, steps, diffusion_form=form, init_time=0.9, last_step_size=0.05)
            (m0, s0), (m1, s1) = (self.law(sched.interpolant, t) for t in (0.9, 0.05))
            mean, std = moments(sched, mean=m0, std=s0, evaluations=-1)
            errors.append(float(torch.maximum((mean - m1).abs(), (std - s1).abs()).max()))
        assert low < errors[0] / errors[1] < high
        assert errors[1] < (0.06 if solver == "sde_euler" else 0.01)

    def law(self, interpolant, t):
        c = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
        return c.alpha * DATA.mean, (c.alpha**2 * DATA.std**2 + c.beta**2).sqrt()

    @every_form
    @pytest.mark.parametrize("interpolant", ["linear", "edm"])
    def test_reaches_the_data(self, interpolant, form):
        mean, std = moments(scheduler(interpolant, "sde_heun", 100, diffusion_form=form, last_step_size=0.02))
        # With d(0) = 1 the noise of the last steps is not small: √(2 · 0.02) before the drift takes it back.
        tolerance = 0.06 if form == "constant" else 0.02
        torch.testing.assert_close(mean, DATA.mean, rtol=0, atol=tolerance)
        torch.testing.assert_close(std, DATA.std, rtol=0, atol=tolerance)

    def test_changes_the_images_but_not_their_law(self):
        spread = [moments(scheduler("linear", "sde_heun", 100, diffusion_norm=norm))[1] for norm in (0.5, 2.0)]
        torch.testing.assert_close(*spread, rtol=0, atol=0.01)
        ends = []
        for norm in (0.5, 2.0):
            sched = scheduler("linear", "sde_heun", 10, diffusion_norm=norm)
            ends.append(run(sched, noise(0, 4, 3), noises=noise(1, 10, 4, 3)))
        assert (ends[0] - ends[1]).abs().min() > 0.01

    def test_sampled_moments_are_the_exact_ones(self):
        sched = scheduler("linear", "sde_heun", 8)
        mean, std = moments(sched)
        sched.set_timesteps(8)
        generator = torch.Generator().manual_seed(0)
        x = sched.init_noise_sigma * noise(0, 100_000, 3)
        for t in sched.timesteps:
            v = DATA.velocity(sched.interpolant, x, t.double().reshape(1))
            x = sched.step(v, t, x, generator=generator).prev_sample
        assert ((x.mean(0) - mean).abs() < 5 * std / 100_000**0.5).all()
        assert ((x.std(0) - std).abs() < 5 * std / 200_000**0.5).all()


class TestLastStep:
    def last(self, **config):
        """Of the last step: x before it, v there, and x after it."""
        sched = scheduler("trigonometric", "sde_euler", 3, **config)
        x = noise(0, 4, 3)
        for t in sched.timesteps:
            v, before = torch.sin(3 * x), x
            x = sched.step(v, t, before, variance_noise=torch.ones_like(x)).prev_sample
        return sched, before, v, x

    @pytest.mark.parametrize("size", [0.04, 0.2])
    def test_variants(self, size):
        for kind in ("mean", "tweedie", "euler"):
            sched, x, v, after = self.last(last_step=kind, last_step_size=size)
            t = sched.timesteps[-1:].double()
            c = sched.interpolant.coefficients(t)
            assert float(t) == pytest.approx(size)
            score = sched.interpolant.convert(v, x, t, "velocity", "score")
            expected = {
                "mean": x - t * (v - c.beta * score),
                "tweedie": (x + c.beta**2 * score) / c.alpha,  # Robbins 1956; Efron 2011
                "euler": x - t * v,
            }
            torch.testing.assert_close(after, expected[kind], rtol=1e-6, atol=1e-6)

    def test_none_goes_on_with_noise(self):
        sched, x, v, after = self.last(last_step=None)
        torch.testing.assert_close(sched.timesteps, torch.linspace(1, 0, 4)[:-1])
        t = sched.timesteps[-1:].double()
        beta = sched.interpolant.coefficients(t).beta
        score = sched.interpolant.convert(v, x, t, "velocity", "score")
        expected = x - t * (v - beta * score) + (2 * beta * t).sqrt()
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("solver", "evaluations"), [("sde_euler", 5), ("sde_heun", 9)])
    @pytest.mark.parametrize("last_step", ["mean", None])
    def test_is_one_of_the_steps(self, solver, evaluations, last_step):
        assert len(scheduler("linear", solver, 5, last_step=last_step).timesteps) == evaluations


class TestContract:
    @pytest.mark.parametrize(
        ("interpolant", "solver"),
        [
            ("linear", "euler"),
            ("trigonometric", "euler"),
            ("vp", "dpmpp_2m"),
            ("ddpm", "dpmpp_2m"),
            ("edm", "dpmpp_2m"),
        ],
    )
    def test_the_default_depends_on_the_path_and_a_saved_choice_stays(self, tmp_path, interpolant, solver):
        sched = scheduler(interpolant)
        assert sched.solver == sched.config.solver == solver
        sched.save_pretrained(tmp_path / "default")
        assert StochasticInterpolantScheduler.from_pretrained(tmp_path / "default").solver == solver
        scheduler(interpolant, "euler").save_pretrained(tmp_path / "euler")
        assert StochasticInterpolantScheduler.from_pretrained(tmp_path / "euler").solver == "euler"

    def test_settings_of_the_sde_are_saved(self, tmp_path):
        config = dict(diffusion_form="sbdm", diffusion_norm=0.3, last_step=None, last_step_size=0.1)
        scheduler("vp", "sde_heun", **config).save_pretrained(tmp_path)
        loaded = StochasticInterpolantScheduler.from_pretrained(tmp_path)
        assert {name: loaded.config[name] for name in config} == config
        assert loaded.diffusion == scheduler("vp", "sde_heun", **config).diffusion

    def test_sbdm_starts_where_its_diffusion_is_finite(self):
        sched = scheduler("linear", "sde_euler", 3, diffusion_form="sbdm")
        assert float(sched.timesteps[0]) == pytest.approx(80 / 81)
        assert sched.init_noise_sigma == pytest.approx(80 / 81)
        assert float(scheduler("vp", "sde_euler", 3, diffusion_form="sbdm").timesteps[0]) == 1.0
        with pytest.raises(ValueError, match=r"start at 1, where the SDE's diffusion is infinite; .* 0\.9877"):
            sched.set_timesteps(timesteps=[1.0, 0.5])

    def test_noise_belongs_to_its_generator(self):
        results = []
        for seeds in ([1, 2], [1, 3]):
            sched = scheduler("linear", "sde_euler", 4)
            x = torch.ones(2, 3, dtype=torch.float64)
            for t in sched.timesteps:
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                x = sched.step(torch.sin(x), t, x, generator=generators).prev_sample
            results.append(x)
        assert torch.equal(results[0][0], results[1][0])
        assert not torch.equal(results[0][1], results[1][1])

    def test_noise_is_that_of_the_float32_run_in_any_dtype(self):
        steps = []
        for dtype in (torch.float64, torch.bfloat16):
            sched = scheduler("linear", "sde_euler", 2, diffusion_norm=1.0)
            x = torch.zeros(2, 3, dtype=dtype)
            generator = torch.Generator().manual_seed(0)
            steps.append(sched.step(x, sched.timesteps[0], x, generator=generator).prev_sample)
        torch.testing.assert_close(steps[1], steps[0].bfloat16(), rtol=1e-2, atol=0)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (dict(solver="rk4"), "`solver` is 'rk4'; choose one of: euler, heun, ddim"),
            (dict(diffusion_form="SBDM2"), "`diffusion_form` is 'SBDM2'; choose one of: sigma, linear, sbdm"),
            (dict(diffusion_norm=-1.0), "`diffusion_norm` must be a positive number, got -1.0"),
            (dict(rtol=float("nan")), "`rtol` must be a positive number, got nan"),
            (dict(rtol="1e-3"), "`rtol` must be a positive number, got '1e-3'"),
            (dict(atol=0.0), "`atol` must be a positive number, got 0.0"),
            (dict(last_step="mode"), "`last_step` is 'mode'; choose one of: mean, tweedie, euler, None"),
            (dict(solver="sde_euler", last_step_size=0.0), "`last_step_size` must lie between 0 and .*, got 0.0"),
            (dict(solver="sde_euler", last_step_size=0.5, init_time=0.4), "the start of sampling, 0.4, got 0.5"),
            (
                dict(solver="dopri5", interpolant="ddpm", timestep_type="discrete"),
                "'dopri5' needs a network that knows",
            ),
        ],
    )
    def test_constructor_refuses(self, config, message):
        with pytest.raises(ValueError, match=message):
            StochasticInterpolantScheduler(**config)

    def test_an_sde_has_two_steps_at_least(self):
        with pytest.raises(ValueError, match="at least 2 for an SDE, got 1"):
            scheduler(solver="sde_euler").set_timesteps(1)

    def test_an_adaptive_solver_has_no_steps(self):
        with pytest.raises(ValueError, match="'dopri5' chooses its own times"):
            scheduler(solver="dopri5").set_timesteps(5)

    def test_the_last_time_may_be_0_only_where_the_path_begins_with_noise(self):
        scheduler("edm").set_timesteps(timesteps=[1.0, 0.5, 0.0])
        with pytest.raises(ValueError, match="must fall strictly"):
            scheduler("vp").set_timesteps(timesteps=[1.0, 0.5, 0.0])
