"""Closed forms for Gaussian data and a Gaussian one-step generator: everything that training estimates is known exactly.

Data N(m, diag S), reference N(0, I), generator G(ε) = μ + diag(τ) ε. All fields are affine in x_t and all losses quadratic
in (ε, x1, z), so that expectations over them are EXACT means over the eight nodes ε = ±1, x1 = ±1, z = ±1 (two-point
Gauss-Hermite quadrature, exact to degree 3); z matters on a bridge, here an unpaired one: ε is another reference than x1.
Dimensions decouple because everything is diagonal: the columns of one tensor may also be read as independent
one-dimensional experiments.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from si_distill.interpolants import Interpolant
from si_distill.objectives import DistillationObjective

NODES = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
#: The four nodes of (ε, x1), for paths without z.
PLAIN_NODES = NODES[NODES[:, 2] > 0]
#: The integral over t is a mean over these times; away from 0, where β' of `vp` and κ are infinite.
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, diag std²) at t = 0; both of shape (D,)."""

    mean: torch.Tensor
    std: torch.Tensor

    def samples(self, z: torch.Tensor) -> torch.Tensor:
        return self.mean + self.std * z

    def x0_given(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[x0 | x_t] = m + α S Σ⁻¹ (x_t − α m), Σ = α² S + β² + γ²."""
        return self.mean + interpolant.at(t, x_t).alpha * self.std**2 * self._centred(interpolant, x_t, t)

    def x1_given(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[x1 | x_t] = β Σ⁻¹ (x_t − α m)."""
        return interpolant.at(t, x_t).beta * self._centred(interpolant, x_t, t)

    def z_given(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[z | x_t] = γ Σ⁻¹ (x_t − α m)."""
        return interpolant.at(t, x_t).gamma * self._centred(interpolant, x_t, t)

    def _centred(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c = interpolant.at(t, x_t)
        return (x_t - c.alpha * self.mean) / (c.alpha**2 * self.std**2 + c.beta**2 + c.gamma**2)

    def velocity(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[İ | x_t], the minimiser of the matching loss."""
        c = interpolant.at(t, x_t)
        velocity = c.d_alpha * self.x0_given(interpolant, x_t, t) + c.d_beta * self.x1_given(interpolant, x_t, t)
        return velocity + c.d_gamma * self.z_given(interpolant, x_t, t)

    def field(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor, space: str) -> torch.Tensor:
        """The exact network in any parameterisation."""
        if space == "velocity":
            return self.velocity(interpolant, x_t, t)
        if space == "sample":
            return self.x0_given(interpolant, x_t, t)
        x1 = self.x1_given(interpolant, x_t, t)
        if space in ("edm", "v_prediction"):  # linear in x0 and x1
            return interpolant.target(self.x0_given(interpolant, x_t, t), x1, t, space)
        return x1 if space == "epsilon" else -x1 / interpolant.at(t, x_t).beta

    def flow_to_data(self, interpolant: Interpolant, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The data's end of the probability-flow ODE through (x_t, t): (x − α m) / √Σ is constant along it.

        It is where β = 0, below t = 0 on the paths that begin with noise.
        """
        c = interpolant.at(t, x_t)
        return self.mean + self.std * (x_t - c.alpha * self.mean) / (c.alpha**2 * self.std**2 + c.beta**2).sqrt()


@dataclass(frozen=True)
class LinearField:
    """slope · x_t + intercept with its own coefficients, shape (T, D), at each of `TIMES`."""

    slope: torch.Tensor
    intercept: torch.Tensor

    def __call__(self, x_t: torch.Tensor) -> torch.Tensor:
        nodes = len(x_t) // len(TIMES)
        slope, intercept = (p.repeat_interleave(nodes, 0) for p in (self.slope, self.intercept))
        return slope * x_t + intercept


@dataclass(frozen=True)
class Game:
    """One objective on one interpolant, with exact expectations by the product's own loss functions."""

    interpolant: Interpolant
    objective: DistillationObjective
    data: Gaussian

    @property
    def nodes(self) -> torch.Tensor:
        return NODES if self.interpolant.noisy else PLAIN_NODES

    @property
    def times(self) -> torch.Tensor:
        return TIMES.repeat_interleave(len(self.nodes))

    def batch(self, law: Gaussian) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, v*, target) of the samples of `law` at all times and nodes, (T · N, D), in the objective's space."""
        noise, x1, z = (nodes.repeat(len(TIMES))[:, None].expand(-1, len(self.data.mean)) for nodes in self.nodes.T)
        x0 = law.samples(noise)
        x_t = self.interpolant.interpolate(x0, x1, self.times, z)
        target = self.interpolant.target(x0, x1, self.times, self.objective.space, z)
        return x_t, self.data.field(self.interpolant, x_t, self.times, self.objective.space), target

    def weight(self) -> torch.Tensor:
        return self.objective.loss_weight(self.interpolant.coefficients(self.times).kappa, weight="uniform")

    def best_critic(self, law: Gaussian) -> LinearField:
        """The affine field that solves the critic's game, by its normal equations at each time and dimension.

        The maximiser of E ℓ over Δ = φᵀ δ, φ = (x_t, 1), is M δ = r with M = c E_gen φφᵀ + (1−c) E_data φφᵀ and
        r = E_gen φ (b İ − a v*) + E_data φ ((1−b) İ − (1−a) v*).
        """
        a, b, c = self.objective.critic
        sums = [0.0] * 4
        for source, (a_, b_, c_) in ((law, (a, b, c)), (self.data, (1 - a, 1 - b, 1 - c))):
            x_t, teacher, target = (v.unflatten(0, (len(TIMES), -1)) for v in self.batch(source))
            residual = b_ * target - a_ * teacher
            terms = (c_ * x_t.square(), c_ * x_t, residual * x_t, residual)
            sums = [total + term.mean(1) for total, term in zip(sums, terms, strict=True)]
        xx, x, rx, r = sums
        determinant = xx - x * x
        delta = LinearField((rx - x * r) / determinant, (xx * r - x * rx) / determinant)
        zero = torch.zeros(len(self.times), len(self.data.mean), dtype=torch.float64)
        at_0, at_1 = (
            self.data.field(self.interpolant, x, self.times, self.objective.space)[:: len(self.nodes)]
            for x in (zero, zero + 1)
        )
        return LinearField(delta.slope + at_1 - at_0, delta.intercept + at_0)

    def critic_loss(self, critic: LinearField, law: Gaussian) -> torch.Tensor:
        fields = [(critic(x_t), teacher, target) for x_t, teacher, target in map(self.batch, (law, self.data))]
        real = fields[1] if self.objective.uses_real_data else None
        return (self.weight() * self.objective.critic_loss(*fields[0], real=real)).mean()

    def generator_loss(self, critic: LinearField, law: Gaussian) -> torch.Tensor:
        x_t, teacher, target = self.batch(law)
        return self.objective.generator_loss(critic(x_t), teacher, target, self.weight()).mean()

    def distance(self, law: Gaussian) -> torch.Tensor:
        """E ‖v* − v_gen‖², the mean over dimensions, in closed form."""
        x_t, _, _ = self.batch(law)
        gap = self.data.velocity(self.interpolant, x_t, self.times) - law.velocity(self.interpolant, x_t, self.times)
        return gap.square().mean()

    def train(self, start: Gaussian, steps: int = 120, learning_rate: float = 0.3) -> Gaussian:
        """Adam on (μ, log τ), cosine decay, the exact critic at every step: the limit of many critic updates."""
        mean = start.mean.clone().requires_grad_()
        log_std = start.std.log().requires_grad_()
        optimizer = torch.optim.Adam([mean, log_std], lr=learning_rate, betas=(0.0, 0.9))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            law = Gaussian(mean, log_std.exp())
            with torch.no_grad():
                critic = self.best_critic(law)
            loss = self.generator_loss(critic, law)
            mean.grad, log_std.grad = torch.autograd.grad(loss, [mean, log_std])
            optimizer.step()
            decay.step()
        return Gaussian(mean.detach(), log_std.exp().detach())


def without_sample_weight(objective: DistillationObjective) -> DistillationObjective:
    """The objective with the weight 1 in velocity space: the `sid` weight is not quadratic in the samples."""
    return replace(objective, weight="uniform")
