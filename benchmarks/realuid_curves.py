#!/usr/bin/env python
"""RealUID's game on one-dimensional mixtures, solved exactly: loss curves, and students of a teacher that is wrong.

    python benchmarks/realuid_curves.py

Densities and velocities of Gaussian mixtures are closed forms, and so is the best critic at every (x, t); what remains is a
sum over a grid. Nothing is trained on samples. All settings: `python benchmarks/realuid_curves.py --help`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import markdown_table, write_json, write_text

from si_distill import DistillationObjective, get_interpolant, get_objective
from si_distill.objectives import interpolant_gap
from si_distill.settings import at_least, parse_settings, script_main, setting

#: (α, β) or (α, β, γ) of the figures; γ = α where it is not given. (1, 1) uses no data; (0.92, 0.94) is RealUID's choice for
#: CIFAR-10; 0.5 is far out, to make the directions visible.
SHOWN = [(1.0, 1.0), (0.9, 0.9), (0.92, 0.94), (0.5, 1.0), (0.5, 1.0, 1.0), (1.0, 0.5), (1.0, 0.5, 0.5)]
#: Ways to leave (1, 1): a share s of the game goes to the data in both terms, in one, or in the other.
WAYS = {"α = β = 1 − s": (1, 1), "α = 1 − s, β = 1": (1, 0), "α = 1, β = 1 − s": (0, 1)}


@dataclass
class CurvesConfig:
    """Settings of the benchmark."""

    points: int = setting(801, "Points of the grid in x, from -8 to 8.")
    times: int = setting(49, "Times of the grid in t, from 0.02 to 0.98, the training times of the configs.")
    curve_points: int = setting(49, "Points of a loss curve.")
    share_points: int = setting(13, "Shares of the data, from 0 to 0.6, in the curves of wrong teachers.")
    output: str = setting("benchmarks/results", "Folder of realuid_curves.json and realuid_curves.md.")
    figures: str = setting("docs/images", "Folder of the figures.")

    def __post_init__(self) -> None:
        for name in ("points", "times", "curve_points", "share_points"):
            at_least(name, getattr(self, name), 2)


@dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(m_k, s_k²) at t = 0; all of shape (K,), float64."""

    weights: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor

    @classmethod
    def of(cls, weights: list[float], means: list[float], stds: list[float]) -> "Mixture":
        return cls(*(torch.tensor(values, dtype=torch.float64) for values in (weights, means, stds)))

    def cdf(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weights * torch.special.ndtr((x[:, None] - self.means) / self.stds)).sum(1)

    def density(self, x: torch.Tensor) -> torch.Tensor:
        normal = torch.exp(-(((x[:, None] - self.means) / self.stds) ** 2) / 2)
        return (self.weights * normal / (self.stds * (2 * torch.pi) ** 0.5)).sum(1)


#: Targets of the second figure: the data, and what each teacher has learned instead.
DATA = Mixture.of([0.5, 0.5], [-1.5, 1.5], [0.3, 0.3])
TEACHERS = {
    "wrong shares": Mixture.of([0.85, 0.15], [-1.5, 1.5], [0.3, 0.3]),
    "a mode displaced": Mixture.of([0.5, 0.5], [-1.5, 2.0], [0.3, 0.3]),
    "blurred": Mixture.of([0.5, 0.5], [-1.5, 1.5], [0.6, 0.6]),
}


class ExactGame:
    """The value of the game at the best critic, max over v_ψ, for laws that are mixtures, on flow matching.

    Args:
        x: (N,) grid of positions, evenly spaced.
        t: (T,) grid of times.
    """

    def __init__(self, x: torch.Tensor, t: torch.Tensor):
        self.interpolant = get_interpolant("linear")
        self.x, self.t = x, t
        self.cell = (x[1] - x[0]) / len(t)

    def density_and_velocity(self, law: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
        """p_t(x) and E[İ | x_t = x], both (T, N)."""
        c = self.interpolant.coefficients(self.t[:, None, None])
        variance = c.alpha**2 * law.stds**2 + c.beta**2
        distance = self.x[:, None] - c.alpha * law.means
        logs = law.weights.log() - distance**2 / (2 * variance) - (2 * torch.pi * variance).log() / 2
        x0 = law.means + c.alpha * law.stds**2 / variance * distance
        x1 = c.beta / variance * distance
        velocity = (logs.softmax(-1) * (c.d_alpha * x0 + c.d_beta * x1)).sum(-1)
        return logs.logsumexp(-1).exp(), velocity

    def value(
        self, objective: DistillationObjective, student: Mixture, data: Mixture, teacher: Mixture
    ) -> torch.Tensor:
        """E_gen ℓ(x; a, b, c) + E_data ℓ(x; 1−a, 1−b, 1−c) at the best critic, a mean over the times."""
        (p_g, v_g), (p_d, v_d) = (self.density_and_velocity(law) for law in (student, data))
        _, v_star = self.density_and_velocity(teacher)
        a, b, c = objective.critic
        # The maximiser of the quadratic at each (x, t): momenta of the velocities against the teacher's.
        momentum = b * p_g * v_g + (1 - b) * p_d * v_d - (a * p_g + (1 - a) * p_d) * v_star
        best = v_star + momentum / (c * p_g + (1 - c) * p_d).clamp(min=1e-300)

        def gap(velocity: torch.Tensor, triple: tuple[float, float, float]) -> torch.Tensor:
            columns = (value.reshape(-1, 1) for value in (best, v_star, velocity))
            return interpolant_gap(*columns, *triple).view_as(velocity)

        total = p_g * gap(v_g, (a, b, c)) + p_d * gap(v_d, (1 - a, 1 - b, 1 - c))
        return total.sum() * self.cell

    def best_student(self, objective: DistillationObjective, data: Mixture, teacher: Mixture) -> Mixture:
        """The law at a minimum of the value over mixtures of as many Gaussians, from the teacher's law."""
        start = torch.stack([teacher.weights.log(), teacher.means, teacher.stds.log()])
        parameters = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def law() -> Mixture:
            return Mixture(parameters[0].softmax(0), parameters[1], parameters[2].exp())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.value(objective, law(), data, teacher)
            loss.backward()
            return loss

        optimizer.step(closure)
        found = law()
        return Mixture(found.weights.detach(), found.means.detach(), found.stds.detach())

    def wasserstein(self, first: Mixture, second: Mixture) -> float:
        """Wasserstein-1 distance of two laws: ∫ |F − G| dx."""
        return float((first.cdf(self.x) - second.cdf(self.x)).abs().sum() * (self.x[1] - self.x[0]))


def realuid(*coefficients: float) -> DistillationObjective:
    return get_objective("realuid", **dict(zip(("alpha", "beta", "gamma"), coefficients, strict=False)))


def name(coefficients: tuple[float, ...]) -> str:
    return ", ".join(f"{letter} = {value:g}" for letter, value in zip("αβγ", coefficients, strict=False))


def loss_curves(config: CurvesConfig, game: ExactGame) -> list[dict]:
    """The game's value along one parameter of a Gaussian student, for data N(0, 1): one entry per panel."""
    data, wrong = Mixture.of([1.0], [0.0], [1.0]), Mixture.of([1.0], [0.5], [1.0])
    means = torch.linspace(-1.5, 1.5, config.curve_points, dtype=torch.float64)
    stds = torch.linspace(0.4, 2.0, config.curve_points, dtype=torch.float64)
    panels = [
        ("right teacher: mean μ of the student", data, means, lambda v: Mixture.of([1.0], [v], [1.0])),
        ("right teacher: spread τ of the student", data, stds, lambda v: Mixture.of([1.0], [0.0], [v])),
        ("teacher at 0.5: mean μ of the student", wrong, means, lambda v: Mixture.of([1.0], [v], [1.0])),
    ]
    drawn = []
    for title, teacher, values, student in panels:
        curves = {
            name(coefficients): [
                float(game.value(realuid(*coefficients), student(v), data, teacher)) for v in values.tolist()
            ]
            for coefficients in SHOWN
        }
        lowest = {key: float(values[torch.tensor(curve).argmin()]) for key, curve in curves.items()}
        drawn.append({"title": title, "at": values.tolist(), "curves": curves, "lowest": lowest})
    return drawn


def corrupted_teachers(config: CurvesConfig, game: ExactGame) -> dict[str, dict]:
    """For each wrong teacher: students of `SHOWN`, and the distance to the data along `WAYS`."""
    found = {}
    shares = torch.linspace(0, 0.6, config.share_points).tolist()
    for kind, teacher in TEACHERS.items():
        students = {
            name(coefficients): game.best_student(realuid(*coefficients), DATA, teacher) for coefficients in SHOWN
        }
        ways = {
            way: [
                game.wasserstein(game.best_student(realuid(1 - i * s, 1 - j * s), DATA, teacher), DATA) for s in shares
            ]
            for way, (i, j) in WAYS.items()
        }
        found[kind] = {
            "teacher": game.wasserstein(teacher, DATA),
            "students": students,
            "distances": {key: game.wasserstein(student, DATA) for key, student in students.items()},
            "shares": shares,
            "ways": ways,
        }
    return found


# What comes out.


def table(found: dict[str, dict]) -> str:
    rows = [["the teacher itself", *(f"{case['teacher']:.3f}" for case in found.values())]]
    rows += [
        [name(coefficients), *(f"{case['distances'][name(coefficients)]:.3f}" for case in found.values())]
        for coefficients in SHOWN
    ]
    return markdown_table(["student", *found], rows)


def draw_curves(panels: list[dict], path: Path) -> None:
    pyplot = _pyplot()
    picture, axes = pyplot.subplots(1, len(panels), figsize=(12.5, 3.8), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for index, (label, curve) in enumerate(panel["curves"].items()):
            axis.plot(panel["at"], curve, label=label, color=f"C{index}", linewidth=1.3)
            axis.plot(panel["lowest"][label], min(curve), "o", color=f"C{index}", markersize=5)
        axis.set_title(panel["title"], fontsize=10)
        axis.set(xlabel="parameter", ylabel="value of the game at the best critic", ylim=(-0.05, 2))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _save(picture, path)


def draw_teachers(game: ExactGame, found: dict[str, dict], path: Path) -> None:
    pyplot = _pyplot()
    picture, axes = pyplot.subplots(2, len(found), figsize=(12.5, 6.6), layout="constrained")
    for column, (kind, case) in enumerate(found.items()):
        axis = axes[0, column]
        axis.fill_between(game.x, DATA.density(game.x), color="0.85", label="data")
        axis.plot(game.x, TEACHERS[kind].density(game.x), "--", color="0.3", linewidth=1.5, label="teacher")
        for index, (label, student) in enumerate(case["students"].items()):
            axis.plot(game.x, student.density(game.x), color=f"C{index}", linewidth=1.1, label=label)
        axis.set(title=f"teacher: {kind}", xlim=(-4, 4), xlabel="x", ylabel="density")
        axis = axes[1, column]
        axis.axhline(case["teacher"], linestyle="--", color="0.3", label="teacher")
        for index, (way, distances) in enumerate(case["ways"].items()):
            axis.plot(case["shares"], distances, "o-", markersize=3, color=f"C{index + 7}", label=way)
        axis.set(xlabel="s", ylabel="Wasserstein-1 to the data", ylim=(0, None))
        axis.grid(alpha=0.3)
    for row in (0, 1):
        axes[row, 0].legend(fontsize=7)
    _save(picture, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    _pyplot().close(picture)


def main(argv: list[str]) -> None:
    config = parse_settings(CurvesConfig, argv, __doc__)
    game = ExactGame(
        torch.linspace(-8, 8, config.points, dtype=torch.float64),
        torch.linspace(0.02, 0.98, config.times, dtype=torch.float64),
    )
    panels, found = loss_curves(config, game), corrupted_teachers(config, game)
    draw_curves(panels, Path(config.figures) / "realuid_loss_curves.png")
    draw_teachers(game, found, Path(config.figures) / "realuid_corrupted_teacher.png")
    for case in found.values():
        case["students"] = {
            key: {part: values.tolist() for part, values in asdict(student).items()}
            for key, student in case["students"].items()
        }
    output = Path(config.output)
    write_json(
        output / "realuid_curves.json",
        {"settings": asdict(config), "loss_curves": panels, "corrupted_teachers": found},
    )
    text = (
        f"{table(found)}\n\nWasserstein-1 distance to the data of the mixture of two Gaussians that minimises the value at "
        f"the best critic, from the teacher's law; {config.points} × {config.times} points of (x, t), float64."
    )
    write_text(output / "realuid_curves.md", text + "\n")
    print(text)


if __name__ == "__main__":
    script_main(main)
