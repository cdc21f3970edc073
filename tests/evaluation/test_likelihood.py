"""The likelihood of Gaussian data, known in closed form, on every path and in every parameterisation."""

import itertools
import math

import pytest
import torch
from gaussian_networks import gaussian_teacher
from gaussian_oracle import Gaussian
from helpers import tiny_sit
from interpolant_families import FAMILIES

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler, get_interpolant
from si_distill.errors import InputError
from si_distill.evaluation.likelihood import bits_per_dimension, log_density
from si_distill.interpolants import GAUSSIAN_INTERPOLANTS, PREDICTIONS
from si_distill.pipelines.interpolant_probability_flow import ProbabilityFlow

DATA = Gaussian(*torch.tensor([[-0.5, 0.3, 1.0], [0.4, 1.0, 1.6]], dtype=torch.float64))
#: Columns of an orthogonal matrix: in these axes the field's Jacobian is not diagonal, and a probe is not exact.
ROTATION = torch.linalg.qr(torch.tensor([[2.0, 1, 0], [1, 1, 1], [0, 1, 3]], dtype=torch.float64)).Q
#: Two-point quadrature: the mean over these is the exact expectation of a quadratic function of x ~ DATA.
NODES = DATA.mean + DATA.std * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)


class Exact:
    """A field by its formula v(x_t, t) of one kind of prediction, in place of a network's."""

    def __init__(self, interpolant, kind, formula):
        self.interpolant, self.kind, self.formula, self.evaluations = interpolant, kind, formula, 0

    def __call__(self, x_t, t, condition, space):
        self.evaluations += 1
        return self.interpolant.convert(self.formula(x_t, t.reshape(1)), x_t, t, self.kind, space)


def flow(it, kind="velocity"):
    return ProbabilityFlow(Exact(it, kind, lambda x, t: DATA.field(it, x, t, kind)), None, it.start_time(kind))


def of_noise(it, angle):
    """Mean and standard deviation of y at an angle."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * DATA.mean, (cos**2 * DATA.std**2 + sin**2).sqrt()


def exact(flow, x):
    """The density that the affine flow carries N(0, I) to."""
    (m0, s0), (m1, s1) = (of_noise(flow.interpolant, angle) for angle in (flow.data_angle, flow.noise_angle))
    cos = math.cos(flow.data_angle)
    y = m1 + s1 * (cos * x - m0) / s0
    return (-0.5 * y**2 - 0.5 * math.log(2 * math.pi) + torch.log(cos * s1 / s0)).sum(-1)


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        *((name, {}, kind) for name in GAUSSIAN_INTERPOLANTS for kind in PREDICTIONS),
        *((*f, "velocity") for f in FAMILIES.values()),
    ],
)
def test_of_gaussian_data_is_the_closed_form(name, config, kind):
    f = flow(get_interpolant(name, **config), kind)
    result = log_density(f, NODES, None, 1e-8, 1e-8)
    torch.testing.assert_close(result.log_density, exact(f, NODES), rtol=0, atol=1e-5)
    assert result.evaluations == f.evaluations > 10


@pytest.mark.parametrize("name", GAUSSIAN_INTERPOLANTS)
def test_its_mean_is_the_entropy(name):
    # What is left is the noise of the path's data end (of `ddpm` 0.01), and data in the noise at its other end.
    entropy = (0.5 * math.log(2 * math.pi * math.e) + DATA.std.log()).sum()
    result = log_density(flow(get_interpolant(name)), NODES, torch.ones(1, 2, 3), 1e-6, 1e-6)
    assert float(-result.log_density.mean()) == pytest.approx(float(entropy), abs=2e-3)


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_probes_are_unbiased(name):
    # Over all signs ε_i ε_j is 0 on the average, so that the mean of the estimator is the trace itself.
    it = get_interpolant(name)

    def predict(x, t):
        return DATA.field(it, x @ ROTATION, t, "velocity") @ ROTATION.T

    turned = ProbabilityFlow(Exact(it, "velocity", predict), None, 1.0)
    x = NODES @ ROTATION.T
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    all_signs = log_density(turned, x, signs[:, None].expand(8, 2, 3), 1e-8, 1e-8).log_density
    trace = log_density(turned, x, None, 1e-8, 1e-8).log_density
    torch.testing.assert_close(all_signs, trace, rtol=0, atol=1e-6)
    torch.testing.assert_close(trace, exact(flow(it), NODES), rtol=0, atol=1e-5)
    one = log_density(turned, x, signs[:1, None].expand(1, 2, 3), 1e-8, 1e-8).log_density
    assert (one - trace).abs().max() > 0.1


class TestBitsPerDimension:
    def test_of_a_gaussian_teacher(self):
        # P(level) = p(x) / 127.5 for levels much narrower than the data.
        teacher = gaussian_teacher(mean=0.1, std=0.4)
        levels = torch.tensor([20, 100, 128, 180]).repeat(500).to(torch.uint8)
        images = levels.reshape(500, 1, 2, 2)
        x = levels[:4].double() / 127.5 - 1
        nats = 0.5 * ((x - 0.1) / 0.4) ** 2 + math.log(0.4) + 0.5 * math.log(2 * math.pi)
        expected = float(nats.mean()) / math.log(2) + math.log2(127.5)
        result = bits_per_dimension(teacher, images, [0] * 500)
        assert result.mean == pytest.approx(expected, abs=1e-3)
        assert 0 < result.standard_error < 1e-3
        assert result.values.shape == (500,)

    def test_counts_the_forwards(self):
        teacher = gaussian_teacher(mean=0.1, std=0.4)
        calls = []
        teacher.transformer.register_forward_hook(lambda *_: calls.append(1))
        result = bits_per_dimension(teacher, torch.full((3, 1, 2, 2), 90, dtype=torch.uint8), [0] * 3)
        assert result.evaluations == len(calls)

    def test_an_image_depends_on_its_own_index_only(self):
        pipe = InterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler())
        images = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        together = bits_per_dimension(pipe, images, [0, 1, 2], seed=3)
        apart = bits_per_dimension(pipe, images, [0, 1, 2], seed=3, batch_size=2)
        torch.testing.assert_close(together.values, apart.values, rtol=0, atol=2e-3)
        assert (bits_per_dimension(pipe, images, [0, 1, 2], seed=4).values - together.values).abs().max() > 0.01
        assert all(p.requires_grad for p in pipe.transformer.parameters())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(images=torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), r"\(1, 8, 8\).*\(2, 1, 4, 4\)"),
            (dict(images=torch.zeros(2, 1, 8, 8)), "torch.float32: pass uint8"),
            (dict(labels=[0]), "1 labels for 2 images"),
            (dict(labels=None), "has 3 classes"),
            (dict(labels=[0, 3]), "from 0 to 3, and the network has 3 classes"),
            (dict(probes=0), "at least 1, or None"),
        ],
    )
    def test_refuses_what_does_not_fit(self, changes, message):
        pipe = InterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler())
        given = dict(images=torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels=[0, 1])
        with pytest.raises(InputError, match=message):
            bits_per_dimension(pipe, **{**given, **changes})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (dict(init_time=0.7), "init_time is 0.7, where .* is 2.33"),
            (dict(interpolant="ddpm", timestep_type="discrete"), "discrete timesteps"),
            (dict(interpolant="bridge"), "starts from, or sees, a reference image"),
        ],
    )
    def test_refuses_a_pipeline_that_has_none(self, settings, message):
        pipe = InterpolantPipeline(tiny_sit(), StochasticInterpolantScheduler(**settings))
        with pytest.raises(InputError, match=message):
            bits_per_dimension(pipe, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1])
