"""Bridges on the one problem where all is known: Gaussian pairs, exact fields, exact samplers' moments, exact critics."""

import pytest
import torch
from gaussian_oracle import TIMES, without_sample_weight
from gaussian_pairs import Critic, Pair, PairGame
from test_gaussian_oracle import CASES, IDS, double

from si_distill import StochasticInterpolantScheduler
from si_distill.interpolants import get_interpolant
from si_distill.objectives import get_objective

PAIR = Pair(double(0.7, -1.0), double(0.8, -0.3), double(0.5, 1.2))
SCALES = (0.3, 1.0, 2.0)
every_case = pytest.mark.parametrize(("preset", "coefficients"), CASES, ids=IDS)
every_scale = pytest.mark.parametrize("scale", SCALES)


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(len(TIMES), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def game(preset="gap", scale=1.0, **settings) -> PairGame:
    return PairGame(
        get_interpolant("bridge", scale=scale), without_sample_weight(get_objective(preset, **settings)), PAIR
    )


def trainable(pair: Pair) -> Pair:
    return Pair(*(value.clone().requires_grad_() for value in (pair.mean, pair.slope, pair.std)))


def gradient(loss: torch.Tensor, law: Pair) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, [law.mean, law.slope, law.std]))


# Fields.


@every_scale
def test_pinned_conversion_of_the_exact_sample_is_the_exact_velocity(scale):
    bridge, x_t, x1 = get_interpolant("bridge", scale=scale), numbers(0), numbers(1)
    sample, velocity = (PAIR.field(bridge, x_t, x1, TIMES, space) for space in ("sample", "velocity"))
    torch.testing.assert_close(bridge.convert(sample, x_t, TIMES, "sample", "velocity", x1=x1), velocity)
    torch.testing.assert_close(bridge.convert(velocity, x_t, TIMES, "velocity", "sample", x1=x1), sample)


@every_scale
def test_conversion_with_the_exact_noise_is_that_of_networks_that_do_not_see_x1(scale):
    bridge, x_t = get_interpolant("bridge", scale=scale), numbers(0)
    exact = PAIR.unseen(bridge, x_t, TIMES)
    for source, target in (("sample", "velocity"), ("velocity", "sample")):
        converted = bridge.convert(exact[source], x_t, TIMES, source, target, z=exact["z"])
        torch.testing.assert_close(converted, exact[target])


@every_scale
def test_the_exact_fields_solve_the_matching_problems(scale):
    for space in ("velocity", "sample"):
        play = game(scale=scale, space=space)
        law = Pair(double(0.1, 0.2), double(-0.5, 1.0), double(0.9, 0.4))
        x_t, x1, teacher, _ = play.batch(law)
        said = play.best_critic(law)(x_t, x1, teacher)
        torch.testing.assert_close(said, law.field(play.interpolant, x_t, x1, play.times, space), rtol=1e-9, atol=1e-9)


# Samplers: exact fields, moments instead of samples.


def moments(scheduler, steps, network, starts, reference=None):
    """(mean, std) of what the sampler makes: with an affine network every step is affine in the state and its noises.

    The rows of the batch are the mean, and the mean with one source of noise each; the sources add up in squares.
    """
    scheduler.set_timesteps(steps)
    count = len(scheduler.timesteps)
    x = torch.cat([starts[:1].expand(1 + count, -1), starts[1:]])
    reference = None if reference is None else reference.expand_as(x)
    for k, t in enumerate(scheduler.timesteps):
        noise = torch.zeros_like(x)
        noise[1 + k] = 1.0
        prediction = network(x, t.double())
        x = scheduler.step(prediction, t, x, variance_noise=noise, return_dict=False, reference=reference)[0]
    return x[0], (x[1:] - x[0]).square().sum(0).sqrt()


def paired_errors(solver: str, counts: list[int], scale: float = 1.0) -> list[float]:
    """Largest error of the conditional mean and deviation at x1 = 1.5, for each number of steps."""
    scheduler = StochasticInterpolantScheduler(
        interpolant="bridge", interpolant_kwargs={"scale": scale}, prediction_type="sample", solver=solver
    )
    x1 = double(1.5, 1.5)[None]

    def network(x, t):
        if t == 1:  # x_t is x1 alone
            return (PAIR.mean + PAIR.slope * x1).expand_as(x)
        return PAIR.field(scheduler.interpolant, x, x1, t, "sample")

    errors = []
    for count in counts:
        mean, std = moments(scheduler, count, network, x1, reference=x1)
        errors.append(float(max((mean - PAIR.mean - PAIR.slope * x1).abs().max(), (std - PAIR.std).abs().max())))
    return errors


@every_scale
@pytest.mark.parametrize(("solver", "order"), [("posterior", 1), ("euler", 1), ("heun", 2)])
def test_samplers_of_pairs_reach_the_conditional_law(solver, order, scale):
    coarse, fine = paired_errors(solver, [20, 80], scale)
    floor = 1e-3 * 1.2**2 / (2 * scale**2)  # the ODE's first step knows x0 only by its mean
    assert fine < coarse / 4**order * 1.9 + floor
    assert fine < 0.05


def test_one_step_of_any_solver_is_the_prediction():
    for solver in ("posterior", "euler", "heun"):
        scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample", solver=solver)
        scheduler.set_timesteps(1)
        (t,) = scheduler.timesteps
        assert t == 1
        assert torch.equal(scheduler.step(2 * PAIR.mean, t, PAIR.mean, return_dict=False)[0], 2 * PAIR.mean)


def test_without_its_noise_the_first_step_would_lose_all_diversity():
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample", solver="heun")
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 18  # 2 N − 2 evaluations
    x1 = x = double(1.5, 1.5)[None]
    mean = PAIR.mean + PAIR.slope * x1
    for t in scheduler.timesteps:
        prediction = mean if t == 1 else PAIR.field(scheduler.interpolant, x, x1, t.double(), "sample")
        x = scheduler.step(prediction, t, x, variance_noise=0 * x, return_dict=False, reference=x1)[0]
    torch.testing.assert_close(x, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "kind"), [("posterior", "sample"), ("euler", "velocity"), ("heun", "velocity")])
def test_samplers_without_pairs_reach_the_law_of_the_data(solver, kind):
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type=kind, solver=solver)

    def network(x, t):
        t = t.clamp(1e-9, 1 - 1e-9)  # where γ' γ is known by its limit only
        return PAIR.unseen(scheduler.interpolant, x, t)[kind]

    errors = []
    for count in (20, 80):
        mean, std = moments(scheduler, count, network, torch.stack([double(0, 0), double(1, 1)]))
        exact = (PAIR.slope**2 + PAIR.std**2).sqrt()
        errors.append(float(max((mean - PAIR.mean).abs().max(), (std - exact).abs().max())))
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.05


# The game.


@every_scale
def test_gap_at_its_critic_is_the_distance_of_the_fields(scale):
    play, law = game(scale=scale), trainable(Pair(double(0.1, 0.2), double(-0.5, 1.0), double(0.9, 0.4)))
    with torch.no_grad():
        critic = play.best_critic(law)
    gap = play.generator_loss(critic, law)
    torch.testing.assert_close(gap, play.distance(law), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(gap, law), gradient(play.distance(law), law), rtol=1e-7, atol=1e-9)


@every_case
@pytest.mark.parametrize("space", ["velocity", "sample"])
def test_normal_equations_solve_the_critics_game(preset, coefficients, space):
    play, law = game(preset, space=space, **coefficients), Pair(double(0.1, 0.2), double(-0.5, 1.0), double(0.9, 0.4))
    best, sizes = play.best_critic(law).delta, []
    for delta in (best, best + 0.1):
        delta = delta.clone().requires_grad_()
        sizes.append(torch.autograd.grad(play.critic_loss(Critic(delta), law), delta)[0].abs().max())
    assert sizes[0] < 1e-10 * sizes[1]


@every_case
def test_the_data_are_stationary(preset, coefficients):
    play, sizes = game(preset, **coefficients), []
    for law in (trainable(Pair(double(0.1, 0.2), double(-0.5, 1.0), double(0.9, 0.4))), trainable(PAIR)):
        with torch.no_grad():
            critic = play.best_critic(law)
        sizes.append(gradient(play.generator_loss(critic, law), law).abs().max())
    assert sizes[1] < 1e-10 * sizes[0]


@every_case
def test_every_preset_finds_the_conditional_mean_and_spread(preset, coefficients):
    # Columns are independent experiments: three laws of pairs, seven starts each.
    ratio = double(0.2, 3, 0.2, 3, 1, 1, 0.6).repeat(3)
    shift = double(0, 0, 3, -3, 3, -3, 1).repeat(3)
    turn = double(1, -1, 0.5, 0, -0.5, 2, -2).repeat(3)
    mean, slope, std = (
        values.repeat_interleave(7) for values in (double(-1, 0.3, 2), double(0.9, 0, -0.5), double(0.5, 1, 1.5))
    )
    objective = without_sample_weight(get_objective(preset, **coefficients))
    play = PairGame(get_interpolant("bridge"), objective, Pair(mean, slope, std))
    end = play.train(Pair(mean + shift * std, slope + turn * std, ratio * std))
    assert ((end.std / std).square() - 1).abs().max() < 0.02
    assert ((end.mean - mean) / std).abs().max() < 0.02
    assert ((end.slope - slope) / std).abs().max() < 0.02


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("gap", [5.59, 1.18, 0.088]), ("cross_term_detached", [0.61, 0.20, 0.027]), ("sid", [9.95, 1.73, 0.095])],
)
def test_the_spread_is_felt_where_the_scale_is_near_it(preset, expected):  # the table of docs/bridges.md
    # Data of conditional deviation 0.1. How the student's missing spread weighs against a shifted mean of the same size:
    # the field depends on x_t only while γ is not far above the deviation, t s² < r².
    felt = []
    for scale in (0.1, 0.3, 1.0):
        play = PairGame(
            get_interpolant("bridge", scale=scale),
            without_sample_weight(get_objective(preset, space="velocity")),
            Pair(double(0), double(0.5), double(0.1)),
        )
        slopes = []
        for law in (Pair(double(0), double(0.5), double(0.02)), Pair(double(0.08), double(0.5), double(0.1))):
            law = trainable(law)
            with torch.no_grad():
                critic = play.best_critic(law)
            slopes.append(gradient(play.generator_loss(critic, law), law))
        felt.append(float(-slopes[0][2] / slopes[1][0]))
    assert felt == pytest.approx(expected, rel=0.02)
