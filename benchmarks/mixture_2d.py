#!/usr/bin/env python
"""Every preset on two-dimensional mixtures: a figure per target, a table of sliced Wasserstein distances, a JSON file.

    python benchmarks/mixture_2d.py --workers 2
    python benchmarks/mixture_2d.py --targets moons --only gap sid --seeds 0 --output runs/mixture --figures runs/mixture

The interpolant, the objectives, the one-step map, the teacher's solver and the moving average are the package's own; only
the networks (small MLPs) and the loop are here. All settings: `python benchmarks/mixture_2d.py --help`.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import (
    Workers,
    advance,
    cell,
    hardware,
    hardware_line,
    markdown_table,
    mean_and_spread,
    write_json,
    write_text,
)
from mixture_points import TARGETS, sliced_wasserstein
from torch import nn

from si_distill import Condition, DistillationObjective, Field, StochasticInterpolantScheduler, get_objective
from si_distill.errors import InputError
from si_distill.objectives import PRESETS
from si_distill.settings import at_least, parse_settings, script_main, setting
from si_distill.training.averaging.ema import EMA

#: Points have no classes.
UNTOLD = Condition()
#: Besides the presets' own defaults: SiD's other coefficient, and the detached direction with SiD's weight and space, which
#: is DMD2 without its adversarial term.
VARIANTS = {
    "sid(1.2)": ("sid", {"alpha": 1.2}),
    "cross_term_detached(sid weight)": ("cross_term_detached", {"space": "sample", "weight": "sid"}),
}
#: Presets that are what they are by an adversarial term on the features of a transformer, which an MLP of points lacks.
ADVERSARIAL = ("sida", "dmd2")
#: Points in the figures, of the many that the distance is computed from.
SHOWN = 3000


@dataclass
class MixtureConfig:
    """Settings of the benchmark."""

    targets: list[str] = setting(["gaussians", "moons"], "Targets to learn.")
    only: list[str] = setting([], "Presets to run; all when empty.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of data, weights and noise; a teacher for each.")
    teacher_steps: int = setting(6000, "Updates of the teacher.")
    steps: int = setting(4000, "Generator updates.")
    critic_steps: int = setting(2, "Critic updates per generator update.")
    batch_size: int = setting(512, "Samples per update.")
    width: int = setting(128, "Hidden width of the networks.")
    teacher_learning_rate: float = setting(3e-3, "Peak of the teacher's cosine.")
    learning_rate: float = setting(3e-4, "Of student and critic, constant.")
    ema_decay: float = setting(0.998, "Moving average of teacher and student.")
    t_min: float = setting(0.02, "Smallest time of the game; the teacher learns on all of [0, 1].")
    t_max: float = setting(0.98, "Largest time of the game.")
    sampling_steps: int = setting(50, "Euler steps of the teacher's samples.")
    samples: int = setting(20000, "Points on each side of a distance.")
    projections: int = setting(256, "Directions of the sliced distance, the same for every row.")
    points: int = setting(50, "Measurements of the gap along a run.")
    workers: int = setting(2, "Processes.")
    output: str = setting("benchmarks/results", "Folder of mixture_2d.json and mixture_2d.md.")
    figures: str = setting("docs/images", "Folder of the figures.")
    quick: bool = setting(False, "A few steps of everything, to see that it runs.")

    def __post_init__(self) -> None:
        if self.quick:
            self.teacher_steps, self.steps, self.samples, self.points, self.seeds = 20, 6, 400, 3, self.seeds[:1]
        names = "teacher_steps steps critic_steps batch_size width sampling_steps projections points workers"
        for name in names.split():
            at_least(name, getattr(self, name), 1)
        for name, known in (("targets", TARGETS), ("only", presets())):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise InputError(f"Unknown `{name}`: {', '.join(unknown)}. Choose from: {', '.join(known)}.")


def presets() -> dict[str, DistillationObjective]:
    """The objectives to compare, by the name of their row."""
    return {name: get_objective(name) for name in PRESETS if name not in ADVERSARIAL} | {
        label: get_objective(name, **changes) for label, (name, changes) in VARIANTS.items()
    }


class VelocityMLP(nn.Module):
    """An unconditional velocity network of points; it is told nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9) / 2)
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: Condition = UNTOLD) -> tuple[torch.Tensor]:
        phase = t[:, None] * self.frequencies
        return (self.layers(torch.cat([x, phase.cos(), phase.sin()], 1)),)


class Setup:
    """What teacher and students of one target and seed share: the path, data, and fresh times and noise."""

    def __init__(self, config: MixtureConfig, target: str, seed: int, stream: int):
        self.config = config
        self.scheduler = StochasticInterpolantScheduler(interpolant="linear", prediction_type="velocity")
        self.interpolant = self.scheduler.interpolant
        self._target = TARGETS[target]
        self.generator = torch.Generator().manual_seed(1000 * seed + stream)

    def data(self, count: int) -> torch.Tensor:
        return self._target(count, self.generator)

    def noise(self, count: int) -> torch.Tensor:
        return torch.randn(count, 2, generator=self.generator)

    def times(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def game_numbers(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh times and noise of a loss of the game, (t, x1)."""
        return self.times(count, self.config.t_min, self.config.t_max), self.noise(count)

    def field(self, network: nn.Module) -> Field:
        return Field(network, self.scheduler)

    @torch.no_grad()
    def many_steps(self, network: nn.Module, count: int) -> torch.Tensor:
        """Samples of a teacher's ODE."""
        self.scheduler.set_timesteps(self.config.sampling_steps)
        x, field = self.noise(count), self.field(network)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(field.predict(x, t.expand(count), UNTOLD), t, x).prev_sample
        return x


def train_teacher(config: MixtureConfig, target: str, seed: int) -> dict:
    """A teacher by matching; returns its averaged weights, samples, and their distance next to that of fresh data."""
    setup = Setup(config, target, seed, stream=0)
    torch.manual_seed(seed)
    network = VelocityMLP(config.width)
    ema = EMA.of(network, config.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.teacher_learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.teacher_steps)
    for step in range(config.teacher_steps):
        x0, x1, t = (
            setup.data(config.batch_size),
            setup.noise(config.batch_size),
            setup.times(config.batch_size, 0.0, 1.0),
        )
        x_t = setup.interpolant.interpolate(x0, x1, t)
        loss = (setup.field(network).predict(x_t, t, UNTOLD) - setup.interpolant.velocity(x0, x1, t)).square().mean()
        update(optimizer, loss)
        schedule.step()
        ema.update(network, step)
        advance()
    data, fresh = setup.data(config.samples), setup.data(config.samples)
    made = setup.many_steps(ema.network, config.samples)
    return {
        "target": target,
        "seed": seed,
        "weights": {name: value.numpy() for name, value in ema.network.state_dict().items()},
        "teacher": sliced_wasserstein(made, data, config.projections),
        "floor": sliced_wasserstein(fresh, data, config.projections),
        "samples": {"data": data[:SHOWN].numpy(), "teacher": made[:SHOWN].numpy()},
    }


def distil(config: MixtureConfig, target: str, preset: str, seed: int, weights: dict) -> dict:
    """Plays the game of one preset; returns the student's distance and samples, and the gap along the way."""
    objective = presets()[preset]
    setup = Setup(config, target, seed, stream=1)
    teacher = VelocityMLP(config.width).requires_grad_(False)
    teacher.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    ema = EMA.of(student, config.ema_decay)
    optimizers = {
        network: torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.0, 0.999), fused=True)
        for network in (student, critic)
    }
    held_out = (setup.noise(2048), *setup.game_numbers(2048))
    marks = {round(config.steps ** (i / config.points)) for i in range(config.points + 1)}
    steps, gaps, seconds = [], [], 0.0
    for step in range(config.steps + 1):
        if step in marks:
            steps.append(step)
            gaps.append(measure_gap(setup, teacher, student, critic, held_out))
        if step == config.steps:
            break
        started = time.perf_counter()
        samples = setup.field(student).one_step(setup.noise(config.batch_size), 1.0, UNTOLD)
        for _ in range(config.critic_steps):
            update(optimizers[critic], critic_loss(setup, objective, teacher, critic, samples.detach()))
        critic.requires_grad_(False)
        update(optimizers[student], generator_loss(setup, objective, teacher, critic, samples))
        critic.requires_grad_(True)
        ema.update(student, step)
        seconds += time.perf_counter() - started
        advance()
    # Fixed noise and data for all presets of a seed, however many numbers their games drew.
    measured = Setup(config, target, seed, stream=2)
    with torch.no_grad():
        made = measured.field(ema.network).one_step(measured.noise(config.samples), 1.0, UNTOLD)
    return {
        "target": target,
        "preset": preset,
        "seed": seed,
        "distance": sliced_wasserstein(made, measured.data(config.samples), config.projections),
        "seconds": seconds,
        "steps": steps,
        "gap": gaps,
        "samples": made[:SHOWN].numpy(),
    }


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def critic_loss(setup: Setup, objective, teacher: nn.Module, critic: nn.Module, samples: torch.Tensor) -> torch.Tensor:
    count, path, space = len(samples), setup.interpolant, objective.space
    t, x1 = setup.game_numbers(count)

    def fields(x0: torch.Tensor) -> tuple:
        x_t = path.interpolate(x0, x1, t)
        predictions = (setup.field(network)(x_t, t, UNTOLD, space) for network in (critic, teacher))
        return (*predictions, path.target(x0, x1, t, space))

    real = fields(setup.data(count)) if objective.uses_real_data else None
    weight = objective.loss_weight(path.coefficients(t).kappa, weight=objective.critic_weight)
    return (weight * objective.critic_loss(*fields(samples), real=real)).mean()


def generator_loss(setup: Setup, objective, teacher: nn.Module, critic: nn.Module, samples: torch.Tensor):
    count, path, space = len(samples), setup.interpolant, objective.space
    t, x1 = setup.game_numbers(count)
    x_t = path.interpolate(samples, x1, t)
    seen = setup.field(teacher).predict(x_t, t, UNTOLD)
    fake = setup.field(critic)(x_t, t, UNTOLD, space)
    teacher_sample = path.convert(seen, x_t, t, "velocity", "sample")
    weight = objective.loss_weight(path.coefficients(t).kappa, samples, teacher_sample)
    target = path.target(samples, x1, t, space)
    return objective.generator_loss(fake, path.convert(seen, x_t, t, "velocity", space), target, weight).mean()


@torch.no_grad()
def measure_gap(setup: Setup, teacher: nn.Module, student: nn.Module, critic: nn.Module, held_out: tuple) -> float:
    """E‖v_ψ − v*‖² at x_t of the present student's samples, a mean over the two coordinates, on fixed noise and times."""
    noise, t, x1 = held_out
    x_t = setup.interpolant.interpolate(setup.field(student).one_step(noise, 1.0, UNTOLD), x1, t)
    fake, seen = (setup.field(network).predict(x_t, t, UNTOLD) for network in (critic, teacher))
    return float((fake - seen).square().mean())


# What comes out.


def table(config: MixtureConfig, teachers: list[dict], students: list[dict]) -> str:
    """Rows: the floor, the teacher, each preset; a column for each target."""
    names = list(dict.fromkeys(run["preset"] for run in students))

    def row(title: str, runs: list[dict], key: str) -> list[str]:
        return [title] + [cell([run[key] for run in runs if run["target"] == target], 4) for target in config.targets]

    rows = [
        row("data against data", teachers, "floor"),
        row(f"teacher, {config.sampling_steps} steps", teachers, "teacher"),
    ]
    rows += [row(name, [run for run in students if run["preset"] == name], "distance") for name in names]
    return markdown_table(["generator", *config.targets], rows)


def figure(config: MixtureConfig, target: str, teacher: dict, students: list[dict], path: Path) -> None:
    """Data, teacher and students of the first seed, and the gap of all of them, a mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [run for run in students if run["seed"] == config.seeds[0]]
    clouds = [("data", teacher["samples"]["data"], None)]
    clouds += [(f"teacher, {config.sampling_steps} steps", teacher["samples"]["teacher"], teacher["teacher"])]
    clouds += [(run["preset"], run["samples"], run["distance"]) for run in first]
    columns = math.ceil(len(clouds) / 2)
    picture = pyplot.figure(figsize=(2.2 * columns + 5.2, 4.9), layout="constrained")
    left, right = picture.subfigures(1, 2, width_ratios=[2.2 * columns, 5.2])
    axes = list(left.subplots(2, columns).flat)
    for axis in axes:
        axis.axis("off")
    # There may be more axes than clouds: the grid is filled row by row.
    for axis, (title, points, distance) in zip(axes, clouds, strict=False):
        axis.scatter(
            points[:, 0], points[:, 1], s=1, alpha=0.35, linewidths=0, color="0.25" if distance is None else "C0"
        )
        axis.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
        axis.set_title(title if distance is None else f"{title}\nSW {distance:.3f}", fontsize=9)
    axis = right.subplots()
    for index, run in enumerate(first):
        curves = [other["gap"] for other in students if other["preset"] == run["preset"]]
        mean = [mean_and_spread(list(values))[0] for values in zip(*curves, strict=True)]
        style = ("-", "--", ":")[index // 10 % 3]
        axis.plot(run["steps"], mean, style, label=run["preset"], color=f"C{index % 10}", linewidth=1.2)
    axis.set(xscale="log", yscale="log", xlabel="generator updates", ylabel="E‖v_ψ − v*‖², velocity space")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)
    pyplot.close(picture)


def main(argv: list[str]) -> None:
    config = parse_settings(MixtureConfig, argv, __doc__)
    pairs = [(target, seed) for target in config.targets for seed in config.seeds]
    names = config.only or list(presets())
    order = {name: position for position, name in enumerate(names)}
    tasks = [(config, target, seed) for target, seed in pairs]
    with Workers(config.workers) as workers:
        teachers = list(workers.run(train_teacher, tasks, len(tasks) * config.teacher_steps, "teachers"))
        weights = {(run["target"], run["seed"]): run.pop("weights") for run in teachers}
        tasks = [(config, target, name, seed, weights[target, seed]) for name in names for target, seed in pairs]
        students = list(workers.run(distil, tasks, len(tasks) * config.steps, "students"))
    teachers.sort(key=lambda run: run["seed"])
    students.sort(key=lambda run: (order[run["preset"]], run["seed"]))

    for target in config.targets:
        chosen = next(run for run in teachers if run["target"] == target)
        runs = [run for run in students if run["target"] == target]
        figure(config, target, chosen, runs, Path(config.figures) / f"mixture_2d_{target}.png")
    for run in teachers + students:
        del run["samples"]
    facts = hardware(config.workers)
    write_json(
        Path(config.output) / "mixture_2d.json",
        {"settings": asdict(config), "hardware": facts, "teachers": teachers, "students": students},
    )
    text = (
        f"{table(config, teachers, students)}\n\nSliced Wasserstein-2 distance to the data, mean ± standard deviation over "
        f"{len(config.seeds)} seeds; {config.samples:,} points, {config.projections} projections; {config.steps:,} "
        f"generator updates with {config.critic_steps} critic updates each. {hardware_line(facts)}"
    )
    write_text(Path(config.output) / "mixture_2d.md", text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    script_main(main)
