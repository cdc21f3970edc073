"""The algebra of the objective family in float64: identities hold up to rounding for any tensors."""

import pytest
import torch

from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, Interpolant, get_interpolant
from si_distill.objectives import PRESETS, SID_WEIGHT_FLOOR, DistillationObjective, get_objective, interpolant_gap

TRIPLES = [(1, 1, 1), (0, 1, 0), (0.92, 0.94, 0.92), (1, 1, 2.4), (0.9, 1.1, 0.7), (-0.3, 0.2, 0.0)]
SHAPE = (6, 2, 3, 3)
TIMES = torch.tensor([0.1, 0.25, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64)
SETTINGS = {
    "gap": {},
    "cross_term": {},
    "cross_term_detached": {},
    "sid": dict(alpha=1.2),
    "realuid": dict(alpha=0.92, beta=0.94),
    "realsid": dict(alpha=0.94, beta=0.92, alpha_sid=1.2),
    "sida": dict(alpha=1.2),
    "dmd2": {},
}

every_interpolant = pytest.mark.parametrize("interpolant", GAUSSIAN_INTERPOLANTS)
every_preset = pytest.mark.parametrize("preset", SETTINGS)


def tensor(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or SHAPE), generator=generator, dtype=torch.float64)


def fields(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Any v_ψ, v* and İ."""
    return tensor(seed), tensor(seed + 1), tensor(seed + 2)


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).flatten(1).mean(1)


def close(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def images(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)


class TestGap:
    @pytest.mark.parametrize("triple", TRIPLES)
    def test_is_the_formula_with_means_over_all_axes_but_the_first(self, triple):
        a, b, c = triple
        critic, teacher, target = fields()
        loss = torch.zeros(SHAPE[0], dtype=torch.float64)
        for i in range(SHAPE[0]):
            delta = (critic[i] - teacher[i]).flatten()
            sums = 2 * b * delta @ target[i].flatten() - 2 * a * delta @ teacher[i].flatten() - c * delta @ delta
            loss[i] = sums / 18
        close(interpolant_gap(critic, teacher, target, *triple), loss)

    def test_at_ones_is_the_difference_of_two_matching_losses(self):
        critic, teacher, target = fields()
        expected = dot(teacher - target, teacher - target) - dot(critic - target, critic - target)
        close(interpolant_gap(critic, teacher, target), expected)

    @pytest.mark.parametrize(("alpha", "beta"), [(0.92, 0.94), (0.98, 0.96), (0.5, 1.5)])
    def test_of_realuid_is_a_difference_of_losses_with_a_scaled_target(self, alpha, beta):
        critic, teacher, target = fields()
        scaled = beta / alpha * target
        expected = alpha * (dot(teacher - scaled, teacher - scaled) - dot(critic - scaled, critic - scaled))
        loss = get_objective("realuid", alpha=alpha, beta=beta).generator_loss(critic, teacher, target)
        close(loss, expected)

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
    def test_of_sid_is_the_published_loss(self, alpha):
        critic, teacher, target = fields()
        expected = 2 * (dot(teacher - critic, teacher - target) - alpha * dot(teacher - critic, teacher - critic))
        close(get_objective("sid", alpha=alpha).generator_loss(critic, teacher, target), expected)

    @pytest.mark.parametrize("wrong", [0, 1, 2])
    def test_refuses_shapes_that_would_broadcast(self, wrong):
        arguments = list(fields())
        arguments[wrong] = arguments[wrong][:, :1]
        with pytest.raises(ValueError, match=r"\(6, 1, 3, 3\).*must have one shape"):
            interpolant_gap(*arguments)


class TestPresets:
    def test_settings_of_this_file_cover_every_preset(self):
        assert set(SETTINGS) == set(PRESETS)

    @pytest.mark.parametrize("space", ["velocity", "sample"])
    @pytest.mark.parametrize(
        ("name", "settings"), [("sid", dict(alpha=0.5)), ("realuid", dict(alpha=1, beta=1))], ids=["sid", "realuid"]
    )
    def test_that_equal_gap(self, space, name, settings):
        # The data term of realuid(1, 1) vanishes, without a division by 1 − alpha.
        gap = get_objective("gap", space=space, weight="uniform")
        other = get_objective(name, space=space, weight="uniform", **settings)
        assert not other.uses_real_data
        close(other.generator_loss(*fields()), gap.generator_loss(*fields()))
        close(other.critic_loss(*fields()), gap.critic_loss(*fields()))
        kappa = tensor(3, SHAPE[0])
        close(other.loss_weight(kappa), gap.loss_weight(kappa))

    def test_realuid_with_gamma_alpha_is_realuid(self):
        two = get_objective("realuid", alpha=0.92, beta=0.94)
        three = get_objective("realuid", alpha=0.92, beta=0.94, gamma=0.92)
        close(two.generator_loss(*fields()), three.generator_loss(*fields()))
        close(two.critic_loss(*fields(), real=fields(5)), three.critic_loss(*fields(), real=fields(5)))

    @pytest.mark.parametrize("gamma", [None, 0.97])
    def test_realuid_in_its_beta_parametrization_is_the_same_game_for_another_critic(self, gamma):
        alpha, beta = 0.92, 0.8
        standard = get_objective("realuid", alpha=alpha, beta=beta, gamma=gamma)
        scaled = get_objective("realuid", alpha=alpha, beta=beta, gamma=gamma, parametrization="beta")
        (critic, teacher, target), (real_critic, real_teacher, real_target) = fields(), fields(5)
        nearer, real_nearer = teacher + (critic - teacher) / beta, real_teacher + (real_critic - real_teacher) / beta
        close(scaled.generator_loss(nearer, teacher, target), standard.generator_loss(critic, teacher, target))
        close(
            scaled.critic_loss(nearer, teacher, target, (real_nearer, real_teacher, real_target)),
            standard.critic_loss(critic, teacher, target, (real_critic, real_teacher, real_target)),
        )
        # RealUID's loss with its Δ written out.
        delta, c = beta * (critic - teacher), alpha if gamma is None else gamma
        close(
            scaled.generator_loss(critic, teacher, target),
            -c * dot(delta, delta) + 2 * beta * dot(delta, target) - 2 * alpha * dot(delta, teacher),
        )

    def test_realsid_at_half_is_realuid(self):
        realsid = get_objective("realsid", alpha=0.92, beta=0.94, alpha_sid=0.5, weight="uniform")
        realuid = get_objective("realuid", alpha=0.92, beta=0.94)
        assert realsid.critic == realuid.critic
        close(realsid.generator_loss(*fields()), realuid.generator_loss(*fields()))

    @pytest.mark.parametrize(
        ("preset", "settings", "real", "teacher_in_critic", "field_gradient"),
        [
            ("gap", {}, False, False, True),
            ("cross_term", {}, False, False, True),
            ("cross_term_detached", {}, False, False, False),
            ("sid", {}, False, False, True),
            ("sid", dict(alpha=1.2), False, False, True),
            ("realuid", {}, True, False, True),
            ("realuid", dict(alpha=1, beta=1), False, False, True),
            ("realuid", dict(alpha=0.92, beta=0.94, gamma=0.96), True, True, True),
            ("realuid", dict(alpha=1, beta=1, gamma=0.9), True, True, True),
            ("realuid", dict(alpha=0.92, beta=0.94, parametrization="beta"), True, True, True),
            ("realsid", {}, True, False, True),
            ("sida", {}, False, False, True),
            ("dmd2", {}, False, False, False),
        ],
    )
    def test_say_what_they_need(self, preset, settings, real, teacher_in_critic, field_gradient):
        objective = get_objective(preset, **settings)
        assert objective.uses_real_data is real
        assert objective.uses_teacher_in_critic is teacher_in_critic
        assert objective.needs_field_gradient is field_gradient

    def test_live_in_the_space_and_weight_of_their_source(self):
        found = {name: (get_objective(name).space, get_objective(name).weight) for name in PRESETS}
        assert found == {
            "gap": ("velocity", "uniform"),
            "cross_term": ("velocity", "uniform"),
            "cross_term_detached": ("velocity", "uniform"),
            "sid": ("sample", "sid"),
            "realuid": ("velocity", "uniform"),
            "realsid": ("velocity", "sid"),
            "sida": ("sample", "sid"),
            "dmd2": ("sample", "sid"),
        }

    @pytest.mark.parametrize("triple", [(1, 1, 1.2), (1, 1, 0), (0, 1, 1), (1, -0.1, 1), (float("nan"), 1, 1)])
    def test_refuse_a_critic_without_a_maximum(self, triple):
        with pytest.raises(ValueError, match=r"coefficients of 'mine' must"):
            DistillationObjective("mine", triple, (1, 1, 1))

    def test_edm_weight_is_that_of_its_paper_in_sample_space(self):
        kappa, edm = tensor(2, 6), tensor(3, 6).abs()
        close(get_objective("sid").loss_weight(kappa, weight="edm", edm_weight=edm), edm)
        close(get_objective("gap").loss_weight(kappa, weight="edm", edm_weight=edm), edm / kappa**2)

    def test_refuse_what_they_do_not_know(self):
        with pytest.raises(ValueError, match=r"Unknown objective 'sids'.*gap, cross_term, cross_term_detached, sid"):
            get_objective("sids")
        with pytest.raises(ValueError, match="'sid' has no coefficient `beta`; it takes alpha, space, weight"):
            get_objective("sid", beta=0.9)
        with pytest.raises(ValueError, match=r"Unknown space 'epsilon'.*velocity, sample"):
            get_objective("gap", space="epsilon")
        with pytest.raises(ValueError, match=r"Unknown weight 'snr'.*uniform, sid"):
            get_objective("gap", weight="snr")
        with pytest.raises(ValueError, match=r"Unknown parametrization 'gamma' of realuid.*standard, beta"):
            get_objective("realuid", parametrization="gamma")

    @pytest.mark.parametrize("scale", [0, -1, float("nan")])
    def test_refuse_a_scale_of_delta_that_is_not_positive(self, scale):
        with pytest.raises(ValueError, match="scale of Δ in 'mine' must be a positive number"):
            DistillationObjective("mine", (1, 1, 1), (1, 1, 1), delta_scale=scale)


class TestCriticLoss:
    def test_is_the_matching_loss_for_gap_without_a_teacher(self):
        critic, _, target = fields()
        close(get_objective("gap").critic_loss(critic, None, target), dot(critic - target, critic - target))

    def test_adds_the_data_term_with_complementary_coefficients(self):
        objective = get_objective("realuid", alpha=0.92, beta=0.94, gamma=0.7)
        expected = -interpolant_gap(*fields(), 0.92, 0.94, 0.7) - interpolant_gap(*fields(5), 0.08, 0.06, 0.3)
        close(objective.critic_loss(*fields(), real=fields(5)), expected)

    @every_preset
    def test_has_the_same_gradient_without_the_teacher(self, preset):
        objective = get_objective(preset, **SETTINGS[preset])
        critic, real_critic = tensor(0).requires_grad_(), tensor(5).requires_grad_()
        (_, teacher, target), (_, real_teacher, real_target) = fields(), fields(5)
        results = []
        for with_teacher in (True, False):
            real = (real_critic, real_teacher if with_teacher else None, real_target)
            loss = objective.critic_loss(critic, teacher if with_teacher else None, target, real)
            inputs = [critic, real_critic] if objective.uses_real_data else [critic]
            results.append(torch.autograd.grad(loss.sum(), inputs))
        for given, expected in zip(*results, strict=True):
            close(given, expected)
            assert given.abs().max() > 1e-3

    def test_needs_the_teacher_when_it_acts_on_the_critic(self):
        objective = get_objective("realuid", alpha=0.92, beta=0.94, gamma=0.7)
        critic, teacher, target = fields()
        with pytest.raises(ValueError, match="'realuid' needs the teacher"):
            objective.critic_loss(critic, None, target, fields(5))
        with pytest.raises(ValueError, match="'realuid' needs the teacher"):
            objective.critic_loss(critic, teacher, target, (critic, None, target))

    def test_needs_real_data_when_the_preset_uses_them(self):
        with pytest.raises(ValueError, match=r"'realuid' uses real data.*`real` is None"):
            get_objective("realuid").critic_loss(*fields())


class TestGradientOfTheGenerator:
    @staticmethod
    def gradient(objective: DistillationObjective, interpolant: Interpolant) -> tuple[torch.Tensor, ...]:
        """∂ loss / ∂ x_g through x_t and İ, for two small networks; and v_ψ, v*."""
        x_g, x1 = tensor(0, 6, 4).requires_grad_(), tensor(1, 6, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks = [
                torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
                for _ in range(2)
            ]
        x_t = interpolant.interpolate(x_g, x1, TIMES)
        critic, teacher = (network(x_t) for network in networks)
        target = interpolant.target(x_g, x1, TIMES, objective.space)
        loss = objective.generator_loss(critic, teacher, target)
        return torch.autograd.grad(loss.sum(), x_g)[0], critic, teacher

    @every_interpolant
    def test_of_cross_term_detached_is_the_field_difference_and_nothing_else(self, interpolant):
        it = get_interpolant(interpolant)
        gradient, critic, teacher = self.gradient(get_objective("cross_term_detached"), it)
        # ∂İ/∂x0 = α', and the loss is a mean over N = 4 numbers.
        expected = 2 * (critic - teacher) * it.coefficients(TIMES).d_alpha[:, None] / 4
        close(gradient, expected)
        full, _, _ = self.gradient(get_objective("cross_term"), it)
        assert ((full - expected).abs().amax(1) > 1e-3 * expected.abs().amax(1)).all()

    @every_interpolant
    def test_of_cross_term_detached_in_sample_space_has_the_same_form(self, interpolant):
        objective = get_objective("cross_term_detached", space="sample")
        gradient, critic, teacher = self.gradient(objective, get_interpolant(interpolant))
        close(gradient, 2 * (critic - teacher) / 4)

    @every_preset
    def test_reaches_the_networks_only_when_the_preset_says_so(self, preset):
        objective = get_objective(preset, **SETTINGS[preset])
        critic, teacher, target = (x.requires_grad_() for x in fields())
        loss = objective.generator_loss(critic, teacher, target).sum()
        gradients = torch.autograd.grad(loss, [critic, teacher, target], allow_unused=True)
        assert [g is not None for g in gradients] == [*[objective.needs_field_gradient] * 2, True]

    def test_is_weighted_per_sample(self):
        weight = torch.arange(6.0, dtype=torch.float64)
        objective = get_objective("gap")
        close(objective.generator_loss(*fields(), weight), weight * objective.generator_loss(*fields()))


class TestSpaces:
    @staticmethod
    def both_spaces(interpolant: Interpolant):
        """The same critic, teacher and target at x_t as x̂0-predictions and as velocities; x_t and κ."""
        x0, x1, critic, teacher = (tensor(seed) for seed in range(4))
        x_t = interpolant.interpolate(x0, x1, TIMES)
        velocities = [interpolant.convert(x, x_t, TIMES, "sample", "velocity") for x in (critic, teacher)]
        samples = (critic, teacher, x0)
        return samples, (*velocities, interpolant.velocity(x0, x1, TIMES)), x_t, interpolant.coefficients(TIMES).kappa

    @every_interpolant
    @pytest.mark.parametrize("c", [0.0, 0.9, 2.4])
    def test_differ_by_kappa_squared_when_a_equals_b(self, interpolant, c):
        samples, velocities, _, kappa = self.both_spaces(get_interpolant(interpolant))
        close(interpolant_gap(*velocities, 0.9, 0.9, c), kappa**2 * interpolant_gap(*samples, 0.9, 0.9, c))

    @every_interpolant
    @pytest.mark.parametrize("triple", [t for t in TRIPLES if t[0] != t[1]])
    def test_differ_by_a_term_in_x_t_when_a_differs_from_b(self, interpolant, triple):
        it = get_interpolant(interpolant)
        a, b, _ = triple
        samples, velocities, x_t, kappa = self.both_spaces(it)
        c = it.coefficients(TIMES)
        extra = 2 * (b - a) * kappa * c.d_beta / c.beta * dot(samples[0] - samples[1], x_t)
        close(interpolant_gap(*velocities, *triple), kappa**2 * interpolant_gap(*samples, *triple) + extra)
        assert extra.abs().min() > 1e-6

    @every_interpolant
    @pytest.mark.parametrize("weight", ["uniform", "sid"])
    @pytest.mark.parametrize(("preset", "settings"), [("gap", {}), ("sid", dict(alpha=1.2))], ids=["gap", "sid"])
    def test_agree_once_weighted_when_a_equals_b(self, interpolant, weight, preset, settings):
        samples, velocities, _, kappa = self.both_spaces(get_interpolant(interpolant))
        losses = []
        for space, given in (("sample", samples), ("velocity", velocities)):
            objective = get_objective(preset, space=space, weight=weight, **settings)
            w = objective.loss_weight(kappa, samples[2], samples[1])
            losses.append(objective.generator_loss(*given, w))
        close(*losses)


class TestWeights:
    def test_uniform_is_one_in_velocity_space(self):
        kappa = tensor(0, 6)
        close(get_objective("gap").loss_weight(kappa), torch.ones_like(kappa))
        close(get_objective("gap", space="sample").loss_weight(kappa), kappa**2)

    def test_sid_is_one_over_the_mean_distance_in_sample_space(self):
        sample, teacher = tensor(0).requires_grad_(), tensor(1).requires_grad_()
        distance = (sample - teacher).abs().sum((1, 2, 3)) / 18
        weight = get_objective("sid").loss_weight(tensor(2, 6), sample, teacher)
        close(weight, 1 / distance)
        assert not weight.requires_grad

    def test_sid_is_t_squared_over_the_mean_distance_for_velocities_on_linear(self):
        sample, teacher = tensor(0), tensor(1)
        kappa = get_interpolant("linear").coefficients(TIMES).kappa
        weight = get_objective("sid", space="velocity").loss_weight(kappa, sample, teacher)
        close(weight, TIMES**2 / (sample - teacher).abs().flatten(1).mean(1))

    def test_sid_has_a_floor(self):
        x = tensor(0)
        close(get_objective("sid").loss_weight(tensor(2, 6), x, x), torch.full((6,), 1 / SID_WEIGHT_FLOOR).double())

    def test_the_critic_may_ask_for_another_weight_than_the_generators(self):
        kappa = tensor(0, 6)
        close(get_objective("sid").loss_weight(kappa, weight="uniform"), kappa**2)


class VarianceExploding(Interpolant):
    """α = 1: the conditional velocity does not contain the sample."""

    name = "variance_exploding"

    def _path(self, t):
        return torch.ones_like(t), 5 * t, torch.zeros_like(t), torch.full_like(t, 5)


class TestCheckInterpolant:
    @pytest.mark.parametrize("preset", ["cross_term", "cross_term_detached"])
    def test_refuses_a_loss_that_cannot_feel_the_sample(self, preset):
        with pytest.raises(ValueError, match=f"'{preset}' in velocity space.*'variance_exploding'.*space='sample'"):
            get_objective(preset).check_interpolant(VarianceExploding())
        get_objective(preset, space="sample").check_interpolant(VarianceExploding())

    def test_its_reason_is_real(self):
        gradient, _, _ = TestGradientOfTheGenerator.gradient(get_objective("cross_term_detached"), VarianceExploding())
        assert not gradient.any()

    @pytest.mark.parametrize("preset", ["gap", "sid", "realuid", "realsid"])
    @pytest.mark.parametrize("space", ["velocity", "sample"])
    def test_accepts_presets_with_gradient_through_the_fields(self, preset, space):
        get_objective(preset, space=space).check_interpolant(VarianceExploding())

    @every_preset
    @every_interpolant
    def test_accepts_everything_on_the_packages_interpolants(self, preset, interpolant):
        # `edm` is a VarianceExploding of the package: presets that only feel İ live in sample space there.
        space = "sample" if interpolant == "edm" else None
        get_objective(preset, space=space).check_interpolant(get_interpolant(interpolant))
