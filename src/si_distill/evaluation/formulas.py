"""The formulas of metrics between two sets of images: torch-fidelity's on features, with intervals."""

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm.auto import trange

from .features import PixelFeatures

#: Ends of the 95 % intervals: quantiles, and standard deviations of a normal distribution.
QUANTILES, DEVIATIONS = (0.025, 0.975), 1.96
#: Resamples of a share; a draw costs nothing.
SHARE_RESAMPLES = 10_000
#: Size of KID's subsets, torch-fidelity's default; smaller sets of images are one subset each.
KID_SUBSET = 1000
#: Neighbour whose distance is the radius of a ball, torch-fidelity's default (Kynkäänniemi et al. 2019: 3).
NEIGHBOUR = 3

Interval = tuple[float, float]


class Moments:
    """Mean and unbiased covariance of features that come in blocks, in float64."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: torch.Tensor) -> None:
        """Adds a block (B, D)."""
        block = features.double()
        if self.count == 0:  # sums of squares around the first mean: around zero digits would be lost
            self._origin = block.mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._squares = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64, device=block.device)
        block = block - self._origin
        self.count += len(block)
        self._sum += block.sum(0)
        self._squares += block.T @ block

    @property
    def mean(self) -> np.ndarray:
        """(D,)."""
        return (self._origin + self._sum / self.count).cpu().numpy()

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by N − 1."""
        centred = self._squares - torch.outer(self._sum, self._sum) / self.count
        return (centred / (self.count - 1)).cpu().numpy()

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance."""
        return self.mean, self.covariance

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """Of features (N, D)."""
        moments = cls()
        for block in features.split(8192):
            moments.add(block)
        return moments


def frechet_from_moments(
    mean: np.ndarray, covariance: np.ndarray, real_mean: np.ndarray, real_covariance: np.ndarray
) -> float:
    """‖m − m'‖² + tr(C + C' − 2 (C C')^½), Heusel et al. 2017, eq. 6, by torch-fidelity."""
    first, second = {"mu": mean, "sigma": covariance}, {"mu": real_mean, "sigma": real_covariance}
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def frechet_distance(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance between two sets of images on pixel features (`si_distill.evaluation.features`).

    Not an FID: that name belongs to Inception features.

    Args:
        images, reference: (N, C, H, W) and (M, C, H, W), uint8, at least 2 each.
    """
    moments = []
    for name, value in (("images", images), ("reference", reference)):
        if value.dtype != torch.uint8 or value.ndim != 4 or len(value) < 2:
            raise ValueError(
                f"`{name}` must be at least two uint8 images (N, C, H, W), got {value.dtype} {tuple(value.shape)}."
            )
        moments += Moments.of(PixelFeatures("pixels", ["pixels"])(value)[0]).pair
    return frechet_from_moments(*moments)


def peak_signal_to_noise(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """PSNR of each image in decibels, 10 log₁₀(255² / mean squared difference), (N,), float64; at most that of one level.

    Args:
        images, truth: (N, C, H, W), uint8.
    """
    squares = (images.double() - truth.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / squares.clamp(min=1.0))


def default_resamples(width: int) -> int:
    """Resamples for a Fréchet distance on `width` features: each takes a product and an eigenvalue problem of that size."""
    return 200 if width <= 512 else 20


def frechet_interval(
    features: torch.Tensor,
    real_mean: np.ndarray,
    real_covariance: np.ndarray,
    distance: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Bootstrap over the generated samples: their features are drawn again with replacement, the reference stays.

    A resample has fewer distinct samples, so its distance is larger on average, as it is for any smaller N. Therefore only
    their standard deviation is taken, and 1.96 of it laid around `distance`: the interval says how much another draw of the
    same number of samples would move the figure, not what it would be for infinitely many.

    Args:
        features: (N, D), on the device that computes.
        real_mean, real_covariance: of the reference.
        distance: of the whole sample.
        resamples: how many, at least 2.
        seed: of the draws.
    """
    count, width = features.shape
    kind = dict(dtype=torch.float64, device=features.device)
    values, vectors = torch.linalg.eigh(torch.as_tensor(real_covariance, **kind))
    root = vectors * values.clamp(min=0).sqrt()  # tr (C R Rᵀ)^½ = tr (Rᵀ C R)^½, and Rᵀ C R is symmetric
    shift = torch.as_tensor(real_mean, **kind)
    trace = float(values.sum())
    generator = np.random.default_rng(seed)
    found = []
    for _ in trange(resamples, desc="bootstrap", unit="resample", leave=False, delay=2):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        weights = torch.as_tensor(drawn, **kind)
        mean, squares = torch.zeros(width, **kind), torch.zeros(width, width, **kind)
        for block, w in zip(features.split(8192), weights.split(8192), strict=True):
            centred = block.double() - shift
            mean += w @ centred / count
            squares += (centred * w[:, None]).T @ centred
        covariance = (squares - count * torch.outer(mean, mean)) / (count - 1)
        cross = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp(min=0).sqrt().sum()
        found.append(float(mean.square().sum() + covariance.trace() + trace - 2 * cross))
    reach = DEVIATIONS * float(np.std(found, ddof=1))
    return max(distance - reach, 0.0), distance + reach


def share_interval(share: float, count: int, seed: int) -> Interval:
    """Bootstrap of a share of `count` samples (precision, recall, accuracy): a resample's number of hits is binomial."""
    drawn = np.random.default_rng(seed).binomial(count, min(max(share, 0.0), 1.0), size=SHARE_RESAMPLES) / count
    low, high = np.quantile(drawn, QUANTILES)
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> Interval | None:
    """Of a mean of independent values (N,): 1.96 standard errors to both sides; None of one value."""
    if len(values) < 2:
        return None
    mean, reach = float(values.mean()), DEVIATIONS * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean - reach, mean + reach


def kernel_distance(features: torch.Tensor, real: torch.Tensor, subsets: int) -> tuple[float, float]:
    """KID, Bińkowski et al. 2018: unbiased MMD² with (x·y / D + 1)³, mean and standard deviation over subsets."""
    size = min(KID_SUBSET, len(features), len(real))
    subsets = 1 if size == len(features) == len(real) else subsets  # each subset would be the whole
    found = kid_features_to_metric(features, real, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(features: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Improved precision and recall, Kynkäänniemi et al. 2019: shares inside the other set's balls to the third neighbour.

    Args:
        features: of generated images, (N, D), N ≥ 4.
        real: of real images, (M, D), M ≥ 4.
    """
    # In parts: the whole matrix of distances of 50,000 images would be 10 GB.
    found = prc_features_to_metric(features, real, prc_neighborhood=NEIGHBOUR, save_cpu_ram=True, verbose=False)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def spread(samples: torch.Tensor) -> torch.Tensor:
    """How much the samples of each input differ: the unbiased variance over them, averaged over the values, (N,) float64.

    Args:
        samples: (K, N, …), K samples of each of N inputs: images, or features of them.

    Raises:
        ValueError: for fewer than two samples of an input.
    """
    if samples.ndim < 3 or len(samples) < 2:
        raise ValueError(
            f"A spread needs at least two samples of each input, shape (K, N, …) with K ≥ 2, got {tuple(samples.shape)}."
        )
    return samples.double().var(0).flatten(1).mean(1)


def diversity(spreads: np.ndarray) -> float:
    """√ of the mean `spread`, in the unit of the values; NaN is an input without one, 0 a deterministic map.

    For a distribution x0 | x1 it estimates √(E tr Cov(x0 | x1) / d), to compare a student with its teacher.
    """
    return float(np.sqrt(np.nanmean(spreads)))


def prompt_distances(features: torch.Tensor, per_prompt: int) -> np.ndarray:
    """Mean cosine distance 1 − cos(f, g) over the pairs of images of each prompt, (P,) float64; 0 is one image again.

    Args:
        features: (P · K, D), K of each prompt after each other; taken as they are, not centred.
        per_prompt: K, at least 2.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1).unflatten(0, (-1, per_prompt))
    # The sum of all K² cosines is |Σ f|²; K of them are those of an image with itself.
    pairs = unit.sum(1).square().sum(1) - unit.square().sum((1, 2))
    return (1 - pairs / (per_prompt * (per_prompt - 1))).cpu().numpy()


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Share of the values (of all channels of all pixels) of each image (N, C, H, W), uint8, at 0 or 255: (N,), float64."""
    return ((images == 0) | (images == 255)).flatten(1).double().mean(1)


def inception_score(logits: torch.Tensor) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)), Salimans et al. 2016: mean and standard deviation over ten splits."""
    found = isc_features_to_metric(logits, splits=min(10, len(logits)))
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
