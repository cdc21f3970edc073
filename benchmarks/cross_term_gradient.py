#!/usr/bin/env python
"""Why `cross_term` with full gradients is slow from a teacher's copy: what its generator's gradient is made of.

    python benchmarks/cross_term_gradient.py --teacher runs/digits-teacher

`cross_term` is `gap` plus E[‖v_ψ‖² − ‖v*‖²] (an identity, see docs/objectives.md). On the digits, after some updates of
an objective, the gradients of the three losses in the student's weights are compared: with the critic as it is then, and
with one that went on learning this student until it settled. All settings: `--help`.
"""

import copy
import dataclasses
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import Workers, advance, hardware, hardware_line, markdown_table, write_json, write_text

from si_distill import get_objective
from si_distill.settings import at_least, parse_settings, script_main, setting
from si_distill.training.distillation.config import DistillConfig

LOSSES = ("gap", "cross_term", "cross_term_detached")
#: Number of the first update whose noise is used for the comparison: training never comes that far.
FIRST_JUDGED = 10**9


@dataclass
class GradientConfig:
    """Settings of the comparison."""

    teacher: str = setting("runs/digits-teacher", "The teacher's folder.")
    base: str = setting("benchmarks/digits_base.yaml", "Settings of the game.")
    objectives: list[str] = setting(["gap", "cross_term"], "Objectives that lead to the states that are looked at.")
    updates: int = setting(60, "Updates of each objective before its state is looked at.")
    settling: int = setting(400, "Further updates of the critic alone.")
    batches: int = setting(16, "Batches that a gradient is the mean of.")
    workers: int = setting(1, "Processes of one thread.")
    output: str = setting("benchmarks/results", "Folder of cross_term_gradient.json and cross_term_gradient.md.")

    def __post_init__(self) -> None:
        for name in ("updates", "settling", "batches", "workers"):
            at_least(name, getattr(self, name), 1)


def gradients(trainer, critic: torch.nn.Module, batches: int) -> dict[str, torch.Tensor]:
    """Gradient of each of `LOSSES` in the student's weights, the mean over batches that training does not use."""
    from si_distill import Condition, Field
    from si_distill.pipelines import view_network

    student = trainer.generator.unwrapped
    weights = list(student.parameters())
    fields = [
        Field(network, trainer.teacher_pipeline.scheduler)
        for network in (view_network(student), critic, trainer.teacher_field.network)
    ]
    sums = {name: torch.zeros(sum(w.numel() for w in weights)) for name in LOSSES}
    indices = range(trainer.settings.per_device_train_batch_size)
    for batch in range(batches):
        update = FIRST_JUDGED + batch
        noise = trainer.noise.normal(trainer.sample_shape, "generator_noise", update, indices=indices)
        told = Condition(trainer.noise.integers(trainer.num_classes, "labels", update, indices=indices))
        u, x1 = trainer.noise.uniform_and_normal(trainer.sample_shape, "generator", update, indices=indices)
        t = trainer.plan.generator_times(u)
        samples = fields[0].one_step(noise, trainer.start.init_time, told)
        x_t = trainer.interpolant.interpolate(samples, x1, t)
        v_critic, v_teacher = (field(x_t, t, told, "velocity") for field in fields[1:])
        target = trainer.interpolant.velocity(samples, x1, t)
        for name in LOSSES:
            loss = get_objective(name).generator_loss(v_critic, v_teacher, target).mean()
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
            sums[name] += torch.cat([g.flatten() for g in found]) / batches
        advance()
    return sums


def compare(objective: str, config: GradientConfig) -> list[dict]:
    """The rows of one state: each loss with the critic as it is and with the settled one."""
    from si_distill.training.distillation.trainer import DistillationTrainer

    arguments = ["--config", config.base, "--teacher", config.teacher, "--objective", objective]
    settings = parse_settings(DistillConfig, [*arguments, "--output_dir", "unset"])
    with tempfile.TemporaryDirectory() as folder:  # named in the settings, but nothing is written outside `train()`
        trainer = DistillationTrainer(dataclasses.replace(settings, output_dir=f"{folder}/run"))

    def critic_after(updates: int) -> torch.nn.Module:
        for _ in range(updates):
            trainer.iteration()
            trainer.step += 1
            advance()
        return copy.deepcopy(trainer.critic.unwrapped).requires_grad_(False)

    live = critic_after(config.updates)
    trainer.settings = dataclasses.replace(
        trainer.settings, generator_start_images=2**31 - 1
    )  # the student stands still
    settled = critic_after(config.settling)
    by_critic = {
        "live": gradients(trainer, live, config.batches),
        "settled": gradients(trainer, settled, config.batches),
    }
    rows = []
    for critic, found in by_critic.items():
        found = {**found, "‖v_ψ‖² − ‖v*‖²": found["cross_term"] - found["gap"]}
        for name, gradient in found.items():
            rows.append(
                {
                    "state": objective,
                    "critic": critic,
                    "loss": name,
                    "norm": float(gradient.norm()),
                    "cosine": float(torch.cosine_similarity(gradient, by_critic["settled"]["gap"], dim=0)),
                }
            )
    return rows


def main(argv: list[str]) -> None:
    config = parse_settings(GradientConfig, argv, __doc__)
    units = config.updates + config.settling + 2 * config.batches
    with Workers(config.workers) as workers:
        tasks = [(objective, config) for objective in config.objectives]
        rows = [row for found in workers.run(compare, tasks, len(tasks) * units, "gradients") for row in found]
    rows.sort(key=lambda row: config.objectives.index(row["state"]))
    facts = hardware(config.workers)
    write_json(
        Path(config.output) / "cross_term_gradient.json", {"settings": asdict(config), "hardware": facts, "rows": rows}
    )
    cells = [[r["state"], r["critic"], r["loss"], f"{r['norm']:.2f}", f"{r['cosine']:.2f}"] for r in rows]
    text = (
        markdown_table(["student and critic after", "critic", "loss", "norm", "cosine with the settled gap"], cells)
        + f"\n\nGradients in the student's weights after {config.updates} updates, the settled critic after "
        f"{config.settling} more of its own; means over {config.batches} batches; seed 0. {hardware_line(facts)}"
    )
    write_text(Path(config.output) / "cross_term_gradient.md", text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    script_main(main)
