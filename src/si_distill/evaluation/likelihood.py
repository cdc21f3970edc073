"""Exact likelihood of a teacher: bits per dimension by the probability-flow ODE.

The flow maps data to noise one to one, so that the change of variables gives the density (Chen et al. 2018, "Neural
Ordinary Differential Equations"; Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix D.2). In the
variables of `ProbabilityFlow`, for d numbers per image and with y(φ₁) ~ N(0, I) at the noise,

    log p(x) = log N(y(φ₁); 0, I) + ∫ div u dφ + d log cos φ₀ ,    y(φ₀) = cos φ₀ x

where the integral runs from the data's angle φ₀ to the noise's φ₁. It is the density of x + σ₀ x1, σ₀ = tan φ₀ (1e-3, or
the first noise level of `ddpm` and `edm`): what the model knows of the data.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..pipelines import InterpolantPipeline
from ..pipelines.interpolant_probability_flow import ProbabilityFlow, as_array, solve_adaptively
from ..sample_noise import SampleNoise

#: Below this β/α at the first time the noise still shows the data and N(0, I) is no prior for it.
SMALLEST_PRIOR_RATIO = 20.0


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of B samples.

    Args:
        log_density: (B,), float64, in nats: log p(x) of a density on the d numbers of x.
        evaluations: network evaluations per sample; each was also differentiated, once for each probe.
    """

    log_density: torch.Tensor
    evaluations: int


def log_density(flow: ProbabilityFlow, x: torch.Tensor, probes: torch.Tensor | None, rtol: float, atol: float):
    """The log-density of a probability flow.

    Args:
        flow: its `predict` must be differentiable.
        x: (B, …), data.
        probes: (P, B, …), independent entries ±1 of Hutchinson's estimator of the divergence, Σ ε·(∂u/∂y) ε / P, kept for
            the whole integral (Grathwohl et al. 2019, "FFJORD", section 3.1): unbiased. None computes the exact trace with
            one derivative for each of the d numbers.
        rtol, atol: tolerances of y and of the integral, in nats per dimension, in each step of Dormand and Prince's pair.

    Returns:
        A `Likelihood`.
    """
    batch, dimension = len(x), x[0].numel()
    before = flow.evaluations

    def divergence(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if probes is None:
            columns = u.flatten(1).unbind(1)
            rows = [torch.autograd.grad(c.sum(), y, retain_graph=True)[0].flatten(1) for c in columns]
            return torch.stack(rows, 1).diagonal(dim1=1, dim2=2).sum(1)
        products = [(torch.autograd.grad((u * e).sum(), y, retain_graph=True)[0] * e).flatten(1).sum(1) for e in probes]
        return torch.stack(products).mean(0)

    def slope(angle: float, state: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            y = torch.as_tensor(state[:-batch]).to(x).view_as(x).requires_grad_()
            u = flow.velocity(y, angle)
            return np.concatenate([as_array(u), as_array(divergence(u, y)) / dimension])

    start = np.concatenate([as_array(math.cos(flow.data_angle) * x), np.zeros(batch)])
    end, _ = solve_adaptively(slope, flow.data_angle, flow.noise_angle, start, rtol, atol, lambda: None)
    noise, integral = end[:-batch].reshape(batch, dimension), end[-batch:]
    prior = -0.5 * (noise**2).sum(1) - 0.5 * dimension * math.log(2 * math.pi)
    total = prior + dimension * (integral + math.log(math.cos(flow.data_angle)))
    return Likelihood(torch.from_numpy(total), flow.evaluations - before)


@dataclass(frozen=True)
class BitsPerDimension:
    """What `bits_per_dimension` measured.

    Args:
        values: (N,), float64, bits per dimension of each image.
        evaluations: network evaluations per image, the mean over the batches.
    """

    values: torch.Tensor
    evaluations: float

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean over images, dequantisation and probes included; NaN for a single image."""
        return float(self.values.std() / math.sqrt(len(self.values)))


def bits_per_dimension(
    pipeline: InterpolantPipeline,
    images: torch.Tensor,
    labels: list[int] | None,
    *,
    seed: int = 0,
    probes: int | None = 1,
    batch_size: int = 256,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> BitsPerDimension:
    """Upper bound of −log₂ P(image) / d, the number of bits per colour value that the model needs for the images.

    A value k of 256 levels is dequantised to x = (k + u − ½) / 127.5 − 1, u ~ U[0, 1): uniform on its level in the [−1, 1]
    scaling of training (Theis et al. 2016, "A note on the evaluation of generative models", section 3.1). With levels of
    width 1/127.5, P(image) = E p(x) / 127.5^d, and by Jensen's inequality

        bits per dimension ≤ −log p(x) / (d ln 2) + log₂ 127.5

    Image i depends on (seed, i) alone, up to the tolerance.

    Args:
        pipeline: a teacher without a VAE.
        images: (N, C, H, W), uint8, as the network's images are.
        labels: the class of each image; None for an unconditional network.
        seed: of the dequantisation and the probes.
        probes: number of Hutchinson's probes; None for the exact trace (only for small images).
        batch_size: images at once.
        rtol, atol: tolerances, see `log_density`.

    Raises:
        InputError: when the pipeline has no likelihood (a VAE, a reference image, discrete timesteps, a start among the
            data), or images or labels do not fit it.
    """
    _check(pipeline, images, labels, probes)
    draws = SampleNoise(seed, pipeline._execution_device)
    scheduler, shape, frozen = pipeline.scheduler, tuple(images.shape[1:]), _Frozen(pipeline.transformer)
    values, evaluations = [], 0
    with frozen:
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            chosen = torch.tensor([labels[i] for i in indices], device=draws.device) if labels is not None else None
            # Standard normal numbers turned into uniform ones and signs: a stream draws one kind.
            noise = draws.normal((1 + (probes or 0), *shape), "likelihood", indices=indices)
            uniform, signs = torch.special.ndtr(noise[:, 0].double()), torch.where(noise[:, 1:] < 0, -1.0, 1.0)
            x = ((images[start : indices.stop].to(draws.device) + uniform - 0.5) / 127.5 - 1).float()
            flow = ProbabilityFlow(
                scheduler.interpolant,
                scheduler.config.prediction_type,
                lambda x_t, t, chosen=chosen: pipeline.predict(x_t, t, chosen),
                scheduler.config.init_time,
            )
            result = log_density(flow, x, None if probes is None else signs.transpose(0, 1), rtol, atol)
            values.append(-result.log_density / (x[0].numel() * math.log(2)) + math.log2(127.5))
            evaluations += result.evaluations * len(indices)
    return BitsPerDimension(torch.cat(values), evaluations / len(images))


class _Frozen:
    """Weights without gradients for a while: only the divergence in x is differentiated."""

    def __init__(self, network: nn.Module):
        self.parameters = [p for p in network.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def _check(pipeline, images, labels, probes) -> None:
    network, scheduler = pipeline.network, pipeline.scheduler
    if pipeline.vae is not None:
        raise InputError("A pipeline with a VAE has no likelihood of images: its density is one of latents.")
    if not scheduler.interpolant.gaussian_reference or network.condition_channels:
        raise InputError(
            "The likelihood needs a teacher that generates from noise alone; this one starts from, or sees, a "
            "reference image."
        )
    if scheduler.config.timestep_type == "discrete":
        raise InputError(
            "The likelihood needs a network that knows all times in [0, 1]; this one has discrete timesteps "
            "(timestep_type='discrete')."
        )
    at = scheduler.interpolant.coefficients(torch.tensor(scheduler.config.init_time, dtype=torch.float64))
    if float(at.beta) < SMALLEST_PRIOR_RATIO * float(at.alpha):
        raise InputError(
            f"The scheduler's init_time is {scheduler.config.init_time:g}, where β/α is {float(at.beta / at.alpha):.3g}: "
            f"the likelihood needs noise to start from, β/α ≥ {SMALLEST_PRIOR_RATIO:g}. A one-step student has none; take "
            "its teacher."
        )
    shape = network.sample_shape
    if images.dtype != torch.uint8 or not len(images) or tuple(images.shape[1:]) != shape:
        raise InputError(
            f"The network has images of shape {shape}, and `images` is {tuple(images.shape)} of {images.dtype}: pass uint8 "
            f"(N, {', '.join(map(str, shape))}), N at least 1."
        )
    if labels is not None and len(labels) != len(images):
        raise InputError(f"There are {len(labels)} labels for {len(images)} images; pass one for each.")
    if labels and not 0 <= min(labels) <= max(labels) < network.num_classes:
        raise InputError(
            f"The labels run from {min(labels)} to {max(labels)}, and the network has {network.num_classes} classes."
        )
    if labels is None and network.num_classes:
        raise InputError(f"The network has {network.num_classes} classes: pass `labels`, one for each image.")
    if probes is not None and probes < 1:
        raise InputError(f"`probes` must be at least 1, or None for the exact trace, got {probes}.")
