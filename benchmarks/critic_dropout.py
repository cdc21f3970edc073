#!/usr/bin/env python
"""What dropout in a critic does to the student's gradient, and to the student, when it is left on where it judges.

    python benchmarks/critic_dropout.py --teacher runs/digits-teacher-dropout --workers 2

The published code of SiD puts the critic in evaluation mode in the student's loss; so does this library. Here the
student's gradient is computed both ways on the same batches, at several points of a distillation from a teacher with
dropout, and whole distillations are compared. Train the teacher with `--model.dropout 0.13` (SiD's rate on CIFAR-10). All
settings: `--help`.
"""

import contextlib
import dataclasses
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import Workers, advance, cell, hardware, hardware_line, markdown_table, write_json, write_text

from si_distill.settings import at_least, parse_settings, script_main, setting
from si_distill.training.distillation.config import DistillConfig

#: Number of the first update whose noise is used for the comparison: training never comes that far.
FIRST_JUDGED = 10**9
MODES = {"evaluation": False, "training": True}


@dataclass
class DropoutConfig:
    """Settings of the comparison."""

    teacher: str = setting("runs/digits-teacher-dropout", "The folder of a teacher that was trained with dropout.")
    base: str = setting("benchmarks/digits_base.yaml", "Settings of the distillation.")
    updates: list[int] = setting([50, 200, 800], "Updates after which gradients are compared.")
    batches: int = setting(64, "Batches of a comparison.")
    steps: int = setting(800, "Updates of the whole distillations.")
    seeds: list[int] = setting([0, 1, 2], "Their seeds.")
    num_samples: int = setting(1797, "Images per evaluation.")
    workers: int = setting(1, "Processes of one thread.")
    output: str = setting("benchmarks/results", "Folder of critic_dropout.json and critic_dropout.md.")

    def __post_init__(self) -> None:
        for name in ("batches", "steps", "workers"):
            at_least(name, getattr(self, name), 1)


def build(config: DropoutConfig, seed: int, folder: str):
    from si_distill.training.distillation.trainer import DistillationTrainer

    arguments = ["--config", config.base, "--teacher", config.teacher, "--seed", str(seed), "--output_dir", "unset"]
    settings = parse_settings(DistillConfig, [*arguments, "--max_steps", str(config.steps)])
    return DistillationTrainer(dataclasses.replace(settings, output_dir=f"{folder}/run", teacher_model={}))


@contextlib.contextmanager
def judging(trainer, in_training: bool):
    """The frozen critic, in training mode where that is asked for."""
    with trainer.critic.frozen() as critic:
        critic.train(in_training)
        try:
            yield critic
        finally:
            critic.eval()


def gradient(trainer, batch: int, in_training: bool, mask: int) -> torch.Tensor:
    """The student's gradient on one batch that training does not use, without dropout of its own."""
    step, trainer.step = trainer.step, FIRST_JUDGED + batch
    drawn = trainer._micro_batch(0)
    torch.manual_seed(mask)
    with judging(trainer, in_training) as critic:
        samples = trainer._generate(trainer.generator.module, drawn)
        loss = trainer._generator_loss(trainer._field(critic), drawn, samples, 0).total
        found = torch.autograd.grad(loss, trainer.generator.parameters, allow_unused=True, materialize_grads=True)
    trainer.step = step
    return torch.cat([g.flatten() for g in found])


def compare_gradients(config: DropoutConfig) -> list[dict]:
    """A row for each point of one distillation."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(config, 0, folder)
        for updates in sorted(config.updates):
            while trainer.step < updates:
                torch.manual_seed(trainer.step)
                trainer.iteration()
                trainer.step += 1
                advance()
            plain, first, second, cosines = [], [], [], []
            for batch in range(config.batches):
                plain.append(gradient(trainer, batch, False, 0))
                first.append(gradient(trainer, batch, True, 2 * batch))
                second.append(gradient(trainer, batch, True, 2 * batch + 1))
                cosines.append(float(torch.cosine_similarity(plain[-1], first[-1], dim=0)))
                advance()
            dropped = torch.stack([*first, *second])
            mean_plain, mean_dropped = torch.stack(plain).mean(0), dropped.mean(0)
            error = (dropped - torch.stack([*plain, *plain])).norm(dim=1).mean()
            rows.append(
                {
                    "updates": updates,
                    "cosine of one batch": sum(cosines) / len(cosines),
                    "error of one mask": float(error / torch.stack(plain).norm(dim=1).mean()),
                    "cosine of the mean": float(torch.cosine_similarity(mean_plain, mean_dropped, dim=0)),
                    "length of the mean": float(mean_dropped.norm() / mean_plain.norm()),
                }
            )
    return rows


def distil(config: DropoutConfig, mode: str, seed: int) -> dict:
    """A whole distillation whose critic judges in one of the modes."""
    from si_distill.data.config import DataConfig
    from si_distill.training.comparison.judge import Judge

    judge = Judge(DataConfig(), config.num_samples)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(config, seed, folder)
        if MODES[mode]:
            frozen = trainer.critic.frozen

            @contextlib.contextmanager
            def in_training():
                with frozen() as critic:
                    critic.train()
                    try:
                        yield critic
                    finally:
                        critic.eval()

            trainer.critic.frozen = in_training
        for _ in range(config.steps):
            torch.manual_seed(trainer.step)
            trainer.iteration()
            trainer.step += 1
            advance()
        return {"mode": mode, "seed": seed, **judge(trainer.pipeline())}


def main(argv: list[str]) -> None:
    config = parse_settings(DropoutConfig, argv, __doc__)
    tasks = [(config, mode, seed) for seed in config.seeds for mode in MODES]
    with Workers(config.workers) as workers:
        units = max(config.updates) + config.batches * len(config.updates)
        (rows,) = workers.run(compare_gradients, [(config,)], units, "gradients")
        runs = list(workers.run(distil, tasks, len(tasks) * config.steps, "students"))
    facts = hardware(config.workers)
    values = {"settings": asdict(config), "hardware": facts, "gradients": rows, "students": runs}
    write_json(Path(config.output) / "critic_dropout.json", values)
    names = [name for name in rows[0] if name != "updates"]
    gradients = markdown_table(
        ["updates", *names], [[f"{r['updates']:,}", *(f"{r[name]:.2f}" for name in names)] for r in rows]
    )
    students = []
    for mode in MODES:
        found = [run for run in runs if run["mode"] == mode]
        students.append([mode, cell([r["distance"] for r in found]), cell([r["accuracy"] for r in found])])
    students = markdown_table(["critic in the student's loss", "Fréchet distance", "label accuracy"], students)
    text = (
        f"{gradients}\n\nThe student's gradient with the critic in training mode against evaluation mode, {config.batches} "
        f"batches, seed 0; means over batches and two masks of each.\n\n{students}\n\nMean ± standard deviation over "
        f"{len(config.seeds)} seeds after {config.steps:,} updates; Fréchet distance on raw pixels, {config.num_samples:,} "
        f"samples of the moving average. {hardware_line(facts)}"
    )
    write_text(Path(config.output) / "critic_dropout.md", text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    script_main(main)
