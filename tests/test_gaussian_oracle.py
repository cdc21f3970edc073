"""The objectives on the one problem where all is known: Gaussian data, Gaussian generator, exact critic."""

import pytest
import torch
from gaussian_oracle import TIMES, Game, Gaussian, LinearField, without_sample_weight

from si_distill.interpolants import INTERPOLANTS, get_interpolant
from si_distill.objectives import PRESETS, DistillationObjective, get_objective

CASES = [
    ("gap", {}),
    ("cross_term", {}),
    ("cross_term_detached", {}),
    ("sid", dict(alpha=1.0)),
    ("sid", dict(alpha=1.2)),
    ("realuid", dict(alpha=0.92, beta=0.94)),
    ("realuid", dict(alpha=0.98, beta=0.96)),
    ("realuid", dict(alpha=0.92, beta=0.94, gamma=0.96)),
    ("realsid", {}),
    ("dmd2", {}),
]
IDS = ["-".join([name, *(f"{value:g}" for value in config.values())]) for name, config in CASES]

every_case = pytest.mark.parametrize(("preset", "coefficients"), CASES, ids=IDS)
#: Presets that feel the sample through the target alone.
TARGET_ONLY = ["cross_term", "cross_term_detached", "dmd2"]

every_interpolant = pytest.mark.parametrize("interpolant", INTERPOLANTS)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_law(seed: int, dim: int) -> Gaussian:
    random = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=random, dtype=torch.float64)
    return Gaussian(mean, 0.4 + 1.4 * torch.rand(dim, generator=random, dtype=torch.float64))


def built(interpolant: str, preset: str, **settings) -> DistillationObjective:
    """The preset, without the weight by samples; on `edm`, whose velocity does not contain the sample, in sample space."""
    if interpolant == "edm":
        settings.setdefault("space", "sample")
    return without_sample_weight(get_objective(preset, **settings))


def game(interpolant: str, preset: str = "gap", dim: int = 2, seed: int = 0, **settings) -> Game:
    return Game(get_interpolant(interpolant), built(interpolant, preset, **settings), random_law(seed, dim))


def parameter_gradient(loss: torch.Tensor, law: Gaussian) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(loss, [law.mean, law.std]))


def trainable(law: Gaussian) -> Gaussian:
    return Gaussian(law.mean.clone().requires_grad_(), law.std.clone().requires_grad_())


def critic_gradient(play: Game, critic: LinearField, law: Gaussian) -> torch.Tensor:
    critic = LinearField(critic.slope.clone().requires_grad_(), critic.intercept.clone().requires_grad_())
    return torch.cat(torch.autograd.grad(play.critic_loss(critic, law), [critic.slope, critic.intercept]))


def test_cases_cover_every_preset():
    # Without its adversarial term `sida` is `sid`.
    sid, sida = get_objective("sid"), get_objective("sida")
    assert (sida.critic, sida.generator, sida.detach, sida.space) == (sid.critic, sid.generator, sid.detach, sid.space)
    assert {name for name, _ in CASES} == set(PRESETS) - {"sida"}


@every_interpolant
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_matching_loss_is_least_at_the_closed_form_velocity(interpolant, dim):
    play = game(interpolant, dim=dim, space="velocity")
    law = random_law(1, dim)
    critic = play.best_critic(law)
    x_t, _, target = play.batch(law)
    torch.testing.assert_close(critic(x_t), law.velocity(play.interpolant, x_t, play.times), rtol=1e-9, atol=1e-9)
    # The normal equations of least squares: the residual is uncorrelated with 1 and x_t at every time.
    residual = (law.velocity(play.interpolant, x_t, play.times) - target).unflatten(0, (len(TIMES), -1))
    inputs = x_t.unflatten(0, (len(TIMES), -1))
    for moment in (residual.mean(1), (residual * inputs).mean(1)):
        torch.testing.assert_close(moment, torch.zeros_like(moment), rtol=0, atol=1e-10)


@every_interpolant
@every_case
@pytest.mark.parametrize("space", ["velocity", "sample"])
def test_normal_equations_solve_the_critics_game(interpolant, preset, coefficients, space):
    play = game(interpolant, preset, space=space, **coefficients)
    law = random_law(1, 2)
    critic = play.best_critic(law)
    gradient = critic_gradient(play, critic, law)
    moved = critic_gradient(play, LinearField(critic.slope + 0.1, critic.intercept), law)
    assert gradient.abs().max() < 1e-10 * moved.abs().max()


@every_interpolant
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_gap_at_its_critic_is_the_distance_of_the_fields(interpolant, dim):
    play = game(interpolant, dim=dim)
    law = random_law(1, dim)
    gap = play.generator_loss(play.best_critic(law), law)
    torch.testing.assert_close(gap, play.distance(law), rtol=1e-10, atol=0)
    assert gap > 0.01


@every_interpolant
def test_gap_vanishes_only_at_the_data(interpolant):
    play = game(interpolant, dim=1)

    def gap(mean_shift: float, scale: float) -> torch.Tensor:
        law = Gaussian(play.data.mean + mean_shift, play.data.std * scale)
        return play.generator_loss(play.best_critic(law), law)

    assert gap(0, 1).abs() < 1e-14
    assert min(gap(0.01, 1), gap(-0.01, 1), gap(0, 1.01), gap(0, 0.99)) > 1e-7


@every_interpolant
def test_gradient_of_gap_is_that_of_the_distance(interpolant):
    # Envelope theorem: the critic's own dependence on the generator does not matter at its optimum.
    play = game(interpolant, dim=16)
    law = trainable(random_law(1, 16))
    with torch.no_grad():
        critic = play.best_critic(law)
    gradient = parameter_gradient(play.generator_loss(critic, law), law)
    torch.testing.assert_close(gradient, parameter_gradient(play.distance(law), law), rtol=1e-9, atol=1e-11)
    assert gradient.abs().min() > 1e-6


@every_interpolant
@every_case
def test_the_data_are_stationary(interpolant, preset, coefficients):
    play = game(interpolant, preset, **coefficients)
    scale = None
    for law in (trainable(random_law(1, 2)), trainable(play.data)):
        with torch.no_grad():
            critic = play.best_critic(law)
        size = parameter_gradient(play.generator_loss(critic, law), law).abs().max()
        scale = size if scale is None else scale
    assert size < 1e-12 * scale


@every_interpolant
@every_case
def test_every_preset_finds_the_data(interpolant, preset, coefficients):
    # Columns are independent experiments: three laws of data, seven starts each, on the border of the basin and inside.
    ratio = double(0.2, 3, 0.2, 3, 1, 1, 0.6).repeat(3)
    shift = double(0, 0, 3, -3, 3, -3, 1).repeat(3)
    mean, std = (values.repeat_interleave(7) for values in (double(-1, 0.3, 2), double(0.5, 1, 1.5)))
    play = Game(get_interpolant(interpolant), built(interpolant, preset, **coefficients), Gaussian(mean, std))
    end = play.train(Gaussian(mean + shift * std, ratio * std))
    assert ((end.std / std).square() - 1).abs().max() < 0.02
    assert ((end.mean - mean) / std).abs().max() < 0.02


@pytest.mark.parametrize("preset", TARGET_ONLY)
def test_presets_of_the_target_alone_have_no_gradient_on_edm_in_velocity_space(preset):
    # α' = 0: İ = σ' x1 does not contain the sample. In sample space the same presets do have one.
    sizes = {}
    for space in ("velocity", "sample"):
        play = game("edm", preset, space=space)
        law = trainable(random_law(1, 2))
        with torch.no_grad():
            critic = play.best_critic(law)
        loss = play.generator_loss(critic, law)
        sizes[space] = parameter_gradient(loss, law).abs().max() if loss.requires_grad else 0.0
    assert sizes["velocity"] < 1e-12 * sizes["sample"]
    with pytest.raises(ValueError, match="space='sample'"):
        game("edm", preset, space="velocity").objective.check_interpolant(get_interpolant("edm"))


@pytest.mark.parametrize("preset", ["gap", "sid", "realuid", "realsid"])
def test_other_presets_find_the_data_on_edm_in_velocity_space_too(preset):
    play = game("edm", preset, dim=3, space="velocity")
    start = Gaussian(play.data.mean + 3 * play.data.std * double(1, 0, -1), play.data.std * double(0.2, 3, 1))
    end = play.train(start)
    torch.testing.assert_close(end.mean, play.data.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(end.std, play.data.std, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_training_in_any_dimension_finds_the_data(dim):
    play = game("linear", "sid", dim=dim, alpha=1.2)
    end = play.train(Gaussian(torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)))
    torch.testing.assert_close(end.mean, play.data.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(end.std, play.data.std, rtol=1e-3, atol=0)


@every_interpolant
def test_sid_above_one_diverges_from_wide_starts_and_sid_one_does_not(interpolant):
    # At the critic's optimum the value of `sid` is 2 (1 − α) E ‖v* − v_gen‖²: for α > 1 distance itself is rewarded.
    # On `edm`, whose times reach β/α = 80 and mostly exceed that of the others, the basin is wider.
    ratio = double(4, 20, 25) if interpolant == "edm" else double(4, 8, 20)
    data = Gaussian(torch.zeros_like(ratio), torch.ones_like(ratio))
    start = Gaussian(torch.zeros_like(ratio), ratio)
    ends = {}
    for alpha in (1.0, 1.2):
        objective = built(interpolant, "sid", alpha=alpha)
        ends[alpha] = Game(get_interpolant(interpolant), objective, data).train(start, steps=200).std
    torch.testing.assert_close(ends[1.0], torch.ones_like(ratio), rtol=0.01, atol=0)
    assert abs(ends[1.2][0] - 1) < 0.01
    assert (ends[1.2][1:] > 100 * ratio[1:]).all()


@pytest.mark.parametrize(("alpha", "inside", "outside"), [(1.2, 5, 7), (1.3, 3.6, 5.1)])
def test_basin_of_sid_above_one_ends_near_alpha_over_alpha_minus_one(alpha, inside, outside):
    # With a fine grid of times over [0, 1] the edge is at τ/√S = α/(α−1) to all printed digits on `linear` and
    # `trigonometric` (2, 3, 6, 21 for α = 2, 1.5, 1.2, 1.05); on `vp` it lies lower, at about 4 to 5.6 for α = 1.2.
    play = Game(
        get_interpolant("linear"),
        without_sample_weight(get_objective("sid", alpha=alpha)),
        Gaussian(double(0, 0), double(1, 1)),
    )
    law = trainable(Gaussian(double(0, 0), double(inside, outside)))
    with torch.no_grad():
        critic = play.best_critic(law)
    downhill = -parameter_gradient(play.generator_loss(critic, law), law)[2:]
    assert downhill[0] < 0 < downhill[1]


def test_cross_term_is_gap_plus_the_difference_of_the_fields_sizes():
    # 2⟨Δ, İ⟩ = [2⟨Δ, İ⟩ − 2⟨Δ, v*⟩ − ‖Δ‖²] + ‖v_ψ‖² − ‖v*‖², whatever the critic.
    cross, gap = (game("linear", preset, dim=16) for preset in ("cross_term", "gap"))
    law = random_law(1, 16)
    critic = LinearField(*(torch.randn(2, len(TIMES), 16, generator=torch.Generator().manual_seed(2)).double()))
    x_t, teacher, _ = cross.batch(law)
    sizes = (critic(x_t).square() - teacher.square()).mean()
    torch.testing.assert_close(cross.generator_loss(critic, law), gap.generator_loss(critic, law) + sizes)


def test_that_difference_takes_half_the_gradient_of_a_student_with_too_little_spread():
    # The exact critic, equal means. A teacher's copy has next to no spread in most directions: there `cross_term` is weak.
    ratios = []
    for spread in (0.1, 0.3, 1.3, 3.0):
        data, law = Gaussian(double(0.0), double(1.0)), trainable(Gaussian(double(0.0), double(spread)))
        slopes = []
        for preset in ("cross_term", "gap"):
            play = Game(get_interpolant("linear"), built("linear", preset), data)
            with torch.no_grad():
                critic = play.best_critic(law)
            slopes.append(torch.autograd.grad(play.generator_loss(critic, law), law.std)[0])
        ratios.append(float(slopes[0] / slopes[1]))
    assert ratios[0] < ratios[1] < 1 < ratios[2] < ratios[3]
    assert 0 < ratios[0] < 0.5
