"""Closed forms for a paired bridge between Gaussians: x1 ~ N(0, I), x0 | x1 ~ N(m + k x1, diag r²).

Every field sees x1 and is affine in (x_t, x1); the student is G(x1, ε) = μ + ρ x1 + τ ε. As in `gaussian_oracle`, losses are
quadratic in (ε, x1, z), so that means over eight nodes are exact expectations, and columns are independent experiments.
"""

from dataclasses import dataclass

import torch
from gaussian_oracle import NODES, TIMES

from si_distill.interpolants import Interpolant
from si_distill.objectives import DistillationObjective


@dataclass(frozen=True)
class Pair:
    """x0 | x1 ~ N(mean + slope x1, diag std²); each of shape (D,)."""

    mean: torch.Tensor
    slope: torch.Tensor
    std: torch.Tensor

    def samples(self, x1: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.mean + self.slope * x1 + self.std * noise

    def field(self, interpolant: Interpolant, x_t, x1, t, space: str) -> torch.Tensor:
        """E[x0 | x_t, x1] or E[İ | x_t, x1], by the regression of each on x_t − E[x_t | x1]; no conversion is used."""
        c, centre = interpolant.at(t, x_t), self.mean + self.slope * x1
        innovation = (x_t - c.alpha * centre - c.beta * x1) / (c.alpha**2 * self.std**2 + c.gamma**2)
        if space == "sample":
            return centre + c.alpha * self.std**2 * innovation
        covariance = c.d_alpha * c.alpha * self.std**2 + c.d_gamma * c.gamma
        return c.d_alpha * centre + c.d_beta * x1 + covariance * innovation

    def unseen(self, interpolant: Interpolant, x_t, t) -> dict[str, torch.Tensor]:
        """E[x0 | x_t], E[z | x_t] and E[İ | x_t] of a network that does not see x1."""
        c, variance = interpolant.at(t, x_t), self.slope**2 + self.std**2
        with_x0, with_x1 = c.alpha * variance + c.beta * self.slope, c.alpha * self.slope + c.beta
        total = c.alpha * with_x0 + c.beta * with_x1 + c.gamma**2
        innovation = (x_t - c.alpha * self.mean) / total
        means = {
            "sample": self.mean + with_x0 * innovation,
            "z": c.gamma * innovation,
            "velocity": c.d_alpha * self.mean
            + (c.d_alpha * with_x0 + c.d_beta * with_x1 + c.d_gamma * c.gamma) * innovation,
        }
        return means


@dataclass(frozen=True)
class Critic:
    """Δ + v* of an affine Δ with its own coefficients of (x_t, x1, 1), shape (T, D, 3), at each of `TIMES`."""

    delta: torch.Tensor

    def __call__(self, x_t: torch.Tensor, x1: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return teacher + (features(x_t, x1) * self.delta.repeat_interleave(len(NODES), 0)).sum(-1)


def features(x_t: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
    return torch.stack([x_t, x1, torch.ones_like(x_t)], -1)


@dataclass(frozen=True)
class PairGame:
    """One objective on a paired bridge, with exact expectations by the product's own loss functions."""

    interpolant: Interpolant
    objective: DistillationObjective
    data: Pair

    @property
    def times(self) -> torch.Tensor:
        return TIMES.repeat_interleave(len(NODES))

    def batch(self, law: Pair) -> tuple[torch.Tensor, ...]:
        """(x_t, x1, v*, target) of the samples of `law` at all times and nodes, (T · 8, D), in the objective's space."""
        noise, x1, z = (nodes.repeat(len(TIMES))[:, None].expand(-1, len(self.data.mean)) for nodes in NODES.T)
        x0, space = law.samples(x1, noise), self.objective.space
        x_t = self.interpolant.interpolate(x0, x1, self.times, z)
        # The teacher predicts the sample, as networks of pairs do; another space is its pinned conversion.
        sample = self.data.field(self.interpolant, x_t, x1, self.times, "sample")
        teacher = self.interpolant.convert(sample, x_t, self.times, "sample", space, x1=x1)
        return x_t, x1, teacher, self.interpolant.target(x0, x1, self.times, space, z)

    def weight(self) -> torch.Tensor:
        return self.objective.loss_weight(self.interpolant.coefficients(self.times).kappa, weight="uniform")

    def best_critic(self, law: Pair) -> Critic:
        """The affine field that solves the critic's game, by its normal equations (see `gaussian_oracle.Game`)."""
        a, b, c = self.objective.critic
        matrix, right = 0.0, 0.0
        for source, (a_, b_, c_) in ((law, (a, b, c)), (self.data, (1 - a, 1 - b, 1 - c))):
            x_t, x1, teacher, target = self.batch(source)
            phi = features(x_t, x1)
            outer, moment = phi[..., :, None] * phi[..., None, :], phi * (b_ * target - a_ * teacher)[..., None]
            matrix = matrix + c_ * outer.unflatten(0, (len(TIMES), -1)).mean(1)
            right = right + moment.unflatten(0, (len(TIMES), -1)).mean(1)
        return Critic(torch.linalg.solve(matrix, right))

    def critic_loss(self, critic: Critic, law: Pair) -> torch.Tensor:
        sides = [
            (critic(x_t, x1, teacher), teacher, target)
            for x_t, x1, teacher, target in map(self.batch, (law, self.data))
        ]
        real = sides[1] if self.objective.uses_real_data else None
        return (self.weight() * self.objective.critic_loss(*sides[0], real=real)).mean()

    def generator_loss(self, critic: Critic, law: Pair) -> torch.Tensor:
        x_t, x1, teacher, target = self.batch(law)
        return self.objective.generator_loss(critic(x_t, x1, teacher), teacher, target, self.weight()).mean()

    def distance(self, law: Pair) -> torch.Tensor:
        """E ‖v* − v_gen‖², the mean over dimensions, in closed form."""
        x_t, x1, _, _ = self.batch(law)
        fields = [which.field(self.interpolant, x_t, x1, self.times, "velocity") for which in (self.data, law)]
        return (fields[0] - fields[1]).square().mean()

    def train(self, start: Pair, steps: int = 100, learning_rate: float = 0.4) -> Pair:
        """Adam on (μ, ρ, log τ), cosine decay, the exact critic at every step: the limit of many critic updates."""
        parameters = [value.clone().requires_grad_() for value in (start.mean, start.slope, start.std.log())]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.0, 0.9))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            law = Pair(parameters[0], parameters[1], parameters[2].exp())
            with torch.no_grad():
                critic = self.best_critic(law)
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(self.generator_loss(critic, law), parameters), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
            decay.step()
        mean, slope, log_std = (parameter.detach() for parameter in parameters)
        return Pair(mean, slope, log_std.exp())
