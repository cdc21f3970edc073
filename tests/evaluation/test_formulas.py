"""Metrics against closed forms."""

from itertools import product

import numpy as np
import pytest
import torch

from si_distill.evaluation.classifier import DigitsClassifier
from si_distill.evaluation.formulas import (
    Moments,
    diversity,
    frechet_distance,
    frechet_from_moments,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    share_interval,
    spread,
)


def images(seed: int, count: int = 200, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, (count, 1, 2, 2), dtype=np.uint8))


def closed_form(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖m1 − m2‖² + tr(C1 + C2 − 2 (C1^½ C2 C1^½)^½), by symmetric eigenvalues (torch-fidelity: eigenvalues of C1 C2)."""
    a, b = (v.flatten(1).double().numpy() / 127.5 - 1 for v in (x, y))
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross)


def test_frechet_distance_of_two_known_gaussians():
    # Covariances with common axes: ‖m − m'‖² + Σ (σ − σ')².
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    own, other = np.array([0.5, 2.0, 0.0]), np.array([1.5, 1.0, 0.25])
    covariances = [axes @ np.diag(s**2) @ axes.T for s in (own, other)]
    found = frechet_from_moments(np.array([1.0, 0, 0]), covariances[0], np.array([0, 0, 2.0]), covariances[1])
    assert found == pytest.approx(5 + ((own - other) ** 2).sum(), rel=1e-7)


def test_frechet_distance_of_images_is_the_closed_form():
    x, y = images(0), images(1, 150, 40, 200)
    assert frechet_distance(x, y) == pytest.approx(closed_form(x, y), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_square():
    x = images(2, high=200)
    shift = 51
    assert frechet_distance(x, x + shift) == pytest.approx(4 * (shift / 127.5) ** 2, rel=1e-9)


def test_frechet_distance_refuses_other_things():
    with pytest.raises(ValueError, match="`images` must be at least two uint8 images"):
        frechet_distance(images(0).float(), images(0))
    with pytest.raises(ValueError, match=r"`reference` .*\(1, 1, 2, 2\)"):
        frechet_distance(images(0), images(0, 1))


def test_moments_in_blocks_are_those_of_the_whole():
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    moments = Moments()
    for block in x.split(300):
        moments.add(block)
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_the_bootstrap_finds_the_spread_of_independent_draws():
    generator = torch.Generator().manual_seed(0)
    mean, covariance = np.array([1.0, 0.0]), np.diag([1.0, 4.0])

    def draw() -> torch.Tensor:
        return torch.randn(300, 2, generator=generator, dtype=torch.float64) * 1.5

    def distance(x: torch.Tensor) -> float:
        moments = Moments.of(x)
        return frechet_from_moments(moments.mean, moments.covariance, mean, covariance)

    spread = np.std([distance(draw()) for _ in range(200)])
    widths = []
    for seed in range(10):
        x = draw()
        low, high = frechet_interval(x, mean, covariance, distance(x), 100, seed)
        assert low < distance(x) < high
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_an_interval_of_a_share_is_the_binomials():
    low, high = share_interval(0.2, 900, 0)
    deviation = (0.2 * 0.8 / 900) ** 0.5
    assert (low, high) == pytest.approx((0.2 - 1.96 * deviation, 0.2 + 1.96 * deviation), abs=2 / 900)  # hits are whole
    assert share_interval(1.0, 50, 0) == (1.0, 1.0)


def test_kid_is_unbiased():
    # Over all draws of two from each of two finite populations the mean is the population's own distance, exactly.
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (3, 4))

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(((a @ b.T / 2 + 1) ** 3).mean())

    expected = mean_kernel(p, p) + mean_kernel(q, q) - 2 * mean_kernel(p, q)
    found = [
        kernel_distance(p[list(i)], q[list(j)], subsets=1)[0]
        for i, j in product(product(range(3), repeat=2), product(range(4), repeat=2))
    ]
    assert np.mean(found) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_of_clouds():
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(50, 2, generator=generator)
    far = cloud + 100
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, far) == (0, 0)
    # A generator of one mode of two: all that it makes is real, half of what is real it makes.
    assert precision_recall(cloud, torch.cat([cloud, far])) == (1, 0.5)
    assert precision_recall(torch.cat([cloud, far]), cloud) == (0.5, 1)


def test_inception_score_of_images_that_all_look_alike_is_one_and_of_sure_ones_more():
    assert inception_score(torch.ones(40, 5))[0] == pytest.approx(1)
    sure = torch.eye(5).repeat(8, 1) * 100
    assert 1 < inception_score(sure)[0] <= 5


def test_classifier_knows_what_it_was_shown():
    shown = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    shown[10:, :, :4] = 255
    labels = [0] * 10 + [1] * 10
    classifier = DigitsClassifier(shown, labels)
    assert classifier.accuracy(shown, labels) == 1
    assert classifier.accuracy(shown, [1] * 10 + labels[10:]) == 0.5


def test_diversity_is_the_deviation_of_the_samples_of_one_input():
    random = torch.Generator().manual_seed(0)
    centres, noise = (torch.randn(shape, generator=random) for shape in ((1, 400, 2), (8, 400, 2)))
    # Deviations 0.3 and 0.4 of the two values: √((0.09 + 0.16) / 2), however far the inputs lie apart.
    spreads = spread(50 * centres + noise * torch.tensor([0.3, 0.4])).numpy()
    assert spreads.shape == (400,)
    assert diversity(spreads) == pytest.approx(0.125**0.5, rel=0.03)
    assert diversity(np.append(spreads, np.nan)) == diversity(spreads)
    assert diversity(spread(centres.expand(8, -1, -1)).numpy()) < 1e-6
    with pytest.raises(ValueError, match=r"K ≥ 2, got \(1, 400, 2\)"):
        spread(centres)
