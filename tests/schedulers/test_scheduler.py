"""The scheduler against exact flows of Gaussian data, and the contract that Diffusers' pipelines rely on."""

import pytest
import torch
from gaussian_oracle import Gaussian
from helpers import UNTOLD, field_on

from si_distill import StochasticInterpolantScheduler, get_interpolant
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, PREDICTIONS

DATA = Gaussian(*torch.tensor([[-0.5, 0.3, 1.0], [0.4, 1.0, 1.6]], dtype=torch.float64))

every_interpolant = pytest.mark.parametrize("interpolant", GAUSSIAN_INTERPOLANTS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_solver = pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])


def noise(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheduler(interpolant: str = "linear", prediction: str = "velocity", solver: str = "euler", **config):
    return StochasticInterpolantScheduler(interpolant=interpolant, prediction_type=prediction, solver=solver, **config)


def defined_init_time(interpolant: str, prediction: str) -> float:
    """x1 alone says nothing about x0 where α = 0; α(1) of `vp`, `ddpm` and `edm` is not 0."""
    vanishes = interpolant in ("linear", "trigonometric")
    return 0.98 if vanishes and prediction in ("epsilon", "score") else 1.0


def exact_network(sched: StochasticInterpolantScheduler, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's output on the input that the scheduler makes of the state."""
    t, kind = t.double(), sched.config.prediction_type
    network_input = sched.scale_model_input(x, t)
    c, data = sched.interpolant.coefficients(t), sched.interpolant.sigma_data
    state = network_input * (c.beta**2 + (c.alpha * data) ** 2).sqrt() if kind == "edm" else network_input
    return DATA.field(sched.interpolant, state, t.reshape(1), kind)


def sample(sched: StochasticInterpolantScheduler, x: torch.Tensor) -> torch.Tensor:
    for t in sched.timesteps:
        x = sched.step(exact_network(sched, x, t), t, x).prev_sample
    return x


class TestSolvers:
    @every_interpolant
    @every_prediction
    @every_solver
    def test_converge_to_the_exact_flow_with_their_order(self, interpolant, prediction, solver):
        sched = scheduler(interpolant, prediction, solver, init_time=defined_init_time(interpolant, prediction))
        errors = []
        for steps in (32, 64):
            sched.set_timesteps(steps)
            x = sched.init_noise_sigma * noise(0, 5, 3)
            exact = DATA.flow_to_data(sched.interpolant, x, sched.timesteps[:1].double())
            errors.append((sample(sched, x) - exact).abs().max())
        # The last step's error is proportional to β² at its start, which on `vp` and its discrete twin `ddpm` begins with
        # b0 t: between the orders. On `edm` steps of t are long at first, and the noise that they move is 80 times larger.
        between = interpolant in ("vp", "ddpm")
        low, high = (1.85, 2.25) if solver != "heun" else (2.7, 3.4) if between else (3.7, 4.4)
        assert low < errors[0] / errors[1] < high
        assert errors[1] < (0.09 if solver != "heun" else 0.008) * (10 if interpolant == "edm" else 1)

    @pytest.mark.parametrize("interpolant", ["vp", "ddpm", "edm"])
    @every_prediction
    def test_one_step_from_the_default_time_is_the_posterior_mean_at_sigma_2_5(self, interpolant, prediction):
        it = get_interpolant(interpolant)
        sched = scheduler(interpolant, prediction, init_time=it.default_init_time(prediction))
        sched.set_timesteps(1)
        x1 = noise(0, 5, 3)
        variance = DATA.std**2
        expected = DATA.mean + variance / (variance + 2.5**2) * (2.5 * x1 - DATA.mean)
        torch.testing.assert_close(sample(sched, sched.init_noise_sigma * x1), expected, rtol=1e-5, atol=1e-5)

    @every_interpolant
    @every_prediction
    @every_solver
    @pytest.mark.parametrize("init_time", [0.98, 0.6])
    def test_with_one_step_are_the_one_step_generator(self, interpolant, prediction, solver, init_time):
        sched = scheduler(interpolant, prediction, solver, init_time=init_time)
        sched.set_timesteps(1)
        x1, times = noise(0, 4, 3), []

        def network(x, t):
            times.extend(t.tolist())
            return torch.tanh(x)

        expected = field_on(sched.interpolant, network, prediction).one_step(x1, init_time, UNTOLD)
        x_t = sched.init_noise_sigma * x1
        (t,) = sched.timesteps
        result = sched.step(torch.tanh(sched.scale_model_input(x_t, t)), t, x_t)
        torch.testing.assert_close(result.prev_sample, expected, rtol=1e-5, atol=1e-5)
        assert times == [init_time] * 4
        assert float(t) == pytest.approx(init_time, abs=1e-7)

    @every_interpolant
    @every_solver
    def test_return_the_sample_prediction_last(self, interpolant, solver):
        sched = scheduler(interpolant, "sample", solver)
        sched.set_timesteps(3)
        x = noise(0, 2, 3)
        for t in sched.timesteps:
            prediction = exact_network(sched, x, t)
            result = sched.step(prediction, t, x)
            assert torch.equal(result.pred_original_sample, prediction)
            x = result.prev_sample
        assert torch.equal(x, prediction)

    def test_euler_moves_along_the_velocity(self):
        sched = scheduler()
        sched.set_timesteps(4)
        x, v = noise(0, 2, 3), noise(1, 2, 3)
        torch.testing.assert_close(sched.step(v, 1.0, x).prev_sample, x - 0.25 * v, rtol=1e-14, atol=0)

    @every_prediction
    def test_ddim_keeps_the_predicted_sample_and_noise(self, prediction):
        sched = scheduler("trigonometric", prediction, "ddim", init_time=0.9)
        x0, x1 = noise(0, 2, 3), noise(1, 2, 3)
        sched.set_timesteps(3)
        x = sched.interpolant.interpolate(x0, x1, sched.timesteps[0].double())
        for t in sched.timesteps:
            torch.testing.assert_close(x, sched.interpolant.interpolate(x0, x1, t.double()), rtol=1e-5, atol=1e-5)
            x = sched.step(sched.interpolant.target(x0, x1, t.double(), prediction), t, x).prev_sample
        torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)

    def test_ddim_is_euler_on_straight_paths(self):
        results = []
        for solver in ("euler", "ddim"):
            sched = scheduler(solver=solver)
            sched.set_timesteps(5)
            results.append(sample(sched, noise(0, 5, 3)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)

    def test_heun_starts_its_second_evaluation_where_euler_would_be_and_averages(self):
        sched = scheduler(solver="heun")
        sched.set_timesteps(4)
        x, first, second = noise(0, 2, 3), noise(1, 2, 3), noise(2, 2, 3)
        predicted = sched.step(first, sched.timesteps[0], x).prev_sample
        torch.testing.assert_close(predicted, x - 0.25 * first, rtol=1e-14, atol=0)
        corrected = sched.step(second, sched.timesteps[1], predicted).prev_sample
        torch.testing.assert_close(corrected, x - 0.125 * (first + second), rtol=1e-14, atol=0)

    @every_solver
    def test_are_differentiable(self, solver):
        sched = scheduler("vp", solver=solver)
        sched.set_timesteps(2)
        x = noise(0, 2, 3).requires_grad_()
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        y = x
        for t in sched.timesteps:
            y = sched.step(scale * torch.tanh(y), t, y).prev_sample
        for gradient in torch.autograd.grad(y.sum(), [x, scale]):
            assert gradient.isfinite().all()
            assert gradient.abs().min() > 0

    def test_add_small_steps_in_float32_and_cast_back(self):
        # 1 + 1e-3 is 1 in bfloat16: in that dtype each step would be rounded away before the cast.
        sched = scheduler()
        sched.set_timesteps(10)
        x, v = noise(0, 2, 3).bfloat16(), noise(1, 2, 3).bfloat16()
        result = sched.step(v, sched.timesteps[0], x)
        width = sched.timesteps[1] - sched.timesteps[0]
        assert torch.equal(result.prev_sample, (x.float() + width * v.float()).bfloat16())
        assert result.pred_original_sample.dtype == torch.bfloat16


class TestTimesteps:
    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_euler_evaluates_once_a_step(self, steps):
        sched = scheduler(init_time=0.7)
        sched.set_timesteps(steps)
        torch.testing.assert_close(sched.timesteps, torch.linspace(0.7, 0, steps + 1)[:-1])
        assert sched.num_inference_steps == steps

    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_heun_evaluates_twice_but_for_the_last_step(self, steps):
        sched = scheduler(solver="heun")
        sched.set_timesteps(steps)
        starts = torch.linspace(1, 0, steps + 1)[:-1]
        assert len(sched.timesteps) == 2 * steps - 1
        torch.testing.assert_close(sched.timesteps[::2], starts)
        torch.testing.assert_close(sched.timesteps[1::2], starts[1:])
        assert sched.order == 2

    @every_solver
    def test_may_be_given(self, solver):
        sched = scheduler(solver=solver)
        sched.set_timesteps(timesteps=[0.9, 0.5, 0.1])
        assert sched.num_inference_steps == 3
        x = noise(0, 2, 3)
        # On `linear` a constant velocity moves by the whole time, whatever the steps.
        v = noise(1, 2, 3)
        for t in sched.timesteps:
            x = sched.step(v, t, x).prev_sample
        torch.testing.assert_close(x, noise(0, 2, 3) - 0.9 * v, rtol=1e-6, atol=1e-6)
        assert sched.init_noise_sigma == pytest.approx(0.9)

    @pytest.mark.parametrize("times", [[], [0.5, 0.5], [0.2, 0.4], [0.5, 0.0], [1.5, 0.5], [999.0, 500.0]])
    def test_are_refused_when_they_do_not_fall_within_0_and_1(self, times):
        with pytest.raises(ValueError, match="must fall strictly and lie in"):
            scheduler().set_timesteps(timesteps=times)

    @pytest.mark.parametrize("arguments", [{}, dict(num_inference_steps=2, timesteps=[1.0])])
    def test_need_exactly_one_description(self, arguments):
        with pytest.raises(ValueError, match="either `num_inference_steps` or `timesteps`"):
            scheduler().set_timesteps(**arguments)

    @pytest.mark.parametrize("steps", [0, -1, 2.5])
    def test_need_a_whole_positive_number(self, steps):
        with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
            scheduler().set_timesteps(steps)

    def test_must_be_set_before_a_step(self):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler().step(noise(0, 2), 1.0, noise(0, 2))

    @every_solver
    def test_find_their_index_at_the_start_of_a_step(self, solver):
        sched = scheduler(solver=solver)
        sched.set_timesteps(4)
        found = [sched.index_for_timestep(t) for t in sched.timesteps[:: sched.order]]
        assert found == list(range(0, len(sched.timesteps), sched.order))

    @pytest.mark.parametrize("wrong", [750, 0.7, 0.0])
    def test_refuse_a_time_that_is_not_theirs(self, wrong):
        sched = scheduler()
        sched.set_timesteps(4)
        with pytest.raises(ValueError, match=f"time {wrong:g} is none of the scheduler's"):
            sched.step(noise(0, 2), wrong, noise(0, 2))

    def test_count_the_evaluations_done(self):
        sched = scheduler(solver="heun")
        sched.set_timesteps(2)
        x = noise(0, 2, 3)
        assert sched.step_index is None
        for n, t in enumerate(sched.timesteps):
            x = sched.step(x, t, x).prev_sample
            assert sched.step_index == n + 1
        with pytest.raises(ValueError, match="All 3 evaluations of the 2 steps are done"):
            sched.step(x, sched.timesteps[-1], x)
        sched.set_timesteps(2)
        assert sched.step_index is None

    def test_may_begin_in_the_middle(self):
        sched = scheduler()
        sched.set_timesteps(4)
        sched.set_begin_index(2)
        x, v = noise(0, 2, 3), noise(1, 2, 3)
        for t in sched.timesteps[2:]:
            x = sched.step(v, t, x).prev_sample
        torch.testing.assert_close(x, noise(0, 2, 3) - 0.5 * v, rtol=1e-14, atol=1e-14)
        assert sched.begin_index == 2

    def test_forget_where_the_last_run_began(self):
        sched = scheduler()
        sched.set_timesteps(4)
        sched.set_begin_index(2)
        sched.set_timesteps(4)
        assert sched.begin_index is None
        sched.step(noise(0, 2), sched.timesteps[0], noise(0, 2))
        assert sched.step_index == 1

    @every_interpolant
    def test_start_with_noise_scaled_by_beta(self, interpolant):
        sched = scheduler(interpolant, init_time=0.5)
        beta = float(get_interpolant(interpolant).coefficients(torch.tensor(0.5)).beta)
        assert sched.init_noise_sigma == pytest.approx(beta, rel=1e-6)
        sched.set_timesteps(3)
        assert sched.init_noise_sigma == pytest.approx(beta, rel=1e-6)


class TestContract:
    @every_solver
    @pytest.mark.parametrize(
        ("interpolant", "settings"),
        [
            ("linear", None),
            ("trigonometric", None),
            ("vp", {"b0": 0.2, "b1": 12.0}),
            ("ddpm", {"num_train_timesteps": 100, "beta_schedule": "scaled_linear"}),
            ("edm", {"sigma_max": 40.0, "sigma_data": 0.7}),
        ],
    )
    def test_save_and_load_give_the_same_step(self, tmp_path, solver, interpolant, settings):
        timestep_type = {"ddpm": "discrete", "edm": "log_sigma"}.get(interpolant, "time")
        sched = scheduler(
            interpolant,
            "sample",
            solver,
            interpolant_kwargs=settings,
            init_time=0.71,
            num_train_timesteps=50,
            timestep_type=timestep_type,
        )
        sched.save_pretrained(tmp_path)
        loaded = StochasticInterpolantScheduler.from_pretrained(tmp_path)
        sched_config = {key: value for key, value in sched.config.items() if key != "_use_default_values"}
        assert dict(loaded.config) == sched_config
        assert loaded.interpolant == get_interpolant(interpolant, **(settings or {}))
        results = []
        for each in (sched, loaded):
            each.set_timesteps(3)
            results.append(sample(each, each.init_noise_sigma * noise(0, 5, 3)))
        assert torch.equal(*results)

    def test_from_config_may_change_a_setting(self):
        sched = scheduler("vp", interpolant_kwargs={"b1": 10.0}, init_time=0.5)
        changed = StochasticInterpolantScheduler.from_config(sched.config, solver="heun")
        assert changed.order == 2
        assert changed.interpolant == sched.interpolant
        assert changed.config.init_time == 0.5

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                dict(prediction_type="v"),
                "Unknown prediction 'v'. Choose one of: velocity, sample, epsilon, score, v_prediction, edm",
            ),
            (dict(init_time=0.0), "`init_time` must lie in .*, got 0.0"),
            (dict(init_time=1.1), "`init_time` must lie in .*, got 1.1"),
            (dict(prediction_type="epsilon"), "epsilon prediction says nothing about the sample .* at 0.9877"),
            (dict(prediction_type="score", interpolant="trigonometric"), "score prediction says nothing"),
            (dict(interpolant="cosine"), "Unknown interpolant 'cosine'"),
            (dict(interpolant_kwargs={"b0": 1}), "'linear' has no setting `b0`"),
            (dict(interpolant="vp", interpolant_kwargs={"b0": 3, "b1": 2}), "0 < b0 < b1"),
            (dict(interpolant="edm", interpolant_kwargs={"sigma_max": 0}), "0 < sigma_min < sigma_max"),
            (dict(num_train_timesteps=0), "at least 1, got 0"),
        ],
    )
    def test_constructor_refuses(self, config, message):
        with pytest.raises(ValueError, match=message):
            StochasticInterpolantScheduler(**config)

    @every_interpolant
    def test_noising_is_the_interpolant(self, interpolant):
        sched, it = scheduler(interpolant), get_interpolant(interpolant)
        x0, x1, t = noise(0, 4, 2, 3), noise(1, 4, 2, 3), torch.tensor([0.1, 0.4, 0.7, 1.0])
        assert torch.equal(sched.add_noise(x0, x1, t), it.interpolate(x0, x1, t))
        assert torch.equal(sched.scale_noise(x0, t, x1), it.interpolate(x0, x1, t))
        assert torch.equal(sched.get_velocity(x0, x1, t), it.velocity(x0, x1, t))

    def test_noising_refuses_what_would_be_nonsense(self):
        x = noise(0, 2, 3)
        with pytest.raises(ValueError, match="needs the noise"):
            scheduler().scale_noise(x, torch.tensor([0.5, 0.5]))
        # Most schedulers of Diffusers count integer training steps here.
        with pytest.raises(TypeError, match="floating point"):
            scheduler().add_noise(x, x, torch.tensor([10, 999]))

    @pytest.mark.parametrize("prediction", ["velocity", "sample", "epsilon", "score"])
    def test_networks_see_the_sample_itself(self, prediction):
        x = noise(0, 2, 3)
        sched = scheduler("edm", prediction)
        assert sched.scale_model_input(x, 0.5) is x
        assert sched.scale_model_input(x) is x

    @every_interpolant
    @pytest.mark.parametrize("t", [1.0, 0.5, torch.tensor(0.5), torch.tensor([0.2, 0.9])])
    def test_edm_networks_see_the_state_at_unit_variance(self, interpolant, t):
        it, x = get_interpolant(interpolant), noise(0, 2, 3)
        c = it.coefficients(torch.as_tensor(t))
        expected = x / (c.beta.double() ** 2 + 0.25 * c.alpha.double() ** 2).sqrt().reshape(-1, 1)
        torch.testing.assert_close(scheduler(interpolant, "edm").scale_model_input(x, t), expected, rtol=1e-6, atol=0)

    def test_edm_networks_need_the_time_of_their_input(self):
        with pytest.raises(ValueError, match="no `timestep`"):
            scheduler("edm", "edm").scale_model_input(noise(0, 2, 3))

    def test_length_is_the_number_of_training_steps(self):
        assert len(scheduler()) == 1000
        assert len(scheduler(num_train_timesteps=7)) == 7

    def test_returns_a_tuple_on_request(self):
        results = []
        for return_dict in (True, False):
            sched = scheduler()
            sched.set_timesteps(2)
            results.append(sched.step(noise(0, 2), 1.0, noise(1, 2), return_dict=return_dict))
        assert torch.equal(results[0].prev_sample, results[1][0])
        assert torch.equal(results[0].pred_original_sample, results[1][1])
