#!/usr/bin/env python
"""What the flow-map term's finite difference costs in accuracy: its residual against the exact derivative's, by step.

    python benchmarks/flow_map_step.py --teacher runs/digits-teacher

A digits student is trained with the term for a while; then the residual of one batch is computed with each step in float32
and under bfloat16 autocast, and compared with that of forward-mode differentiation in float32.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text

from si_distill.settings import at_least, parse_settings, script_main, setting


@dataclass
class StepConfig:
    """Settings of the benchmark."""

    teacher: str = setting("runs/digits-teacher", "The teacher's folder.")
    updates: int = setting(120, "Updates before the residual is looked at.")
    step_sizes: list[float] = setting([0.0025, 0.005, 0.01, 0.02, 0.04, 0.08], "Steps in time.")
    output: str = setting("benchmarks/results", "Folder of flow_map_step.json and flow_map_step.md.")

    def __post_init__(self) -> None:
        at_least("updates", self.updates, 1)


def measure(config: StepConfig) -> tuple[float, list[list[float]]]:
    """Root mean square of R, and for each step its relative error in float32 and in bfloat16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from si_distill.pipelines import Condition
    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.distillation.flow_map import TwoTimeMap
    from si_distill.training.distillation.trainer import DistillationTrainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", "benchmarks/digits_base.yaml", "--teacher", config.teacher, "--flow_map.weight", "1"]
        settings = parse_settings(DistillConfig, [*arguments, "--output_dir", f"{folder}/run"])
        trainer = DistillationTrainer(replace(settings, teacher_model={}))
    while trainer.step < config.updates:
        trainer.iteration()
        trainer.step += 1
    (batch,) = trainer._draw_batches()
    term, student = trainer.flow_map, trainer._student_field(trainer.generator.unwrapped)
    paths = term.paths(trainer.noise, trainer.sample_shape, batch.indices, trainer.step)
    condition, (t, s) = Condition(batch.labels)[paths.rows], (paths.t, paths.s)
    inside = s + max(config.step_sizes) <= t
    t, s, condition, noise = t[inside], s[inside], condition[inside], paths.noise[inside]
    x_t = term.interpolant.at(t, noise).beta * noise
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel has no forward derivative
        x0, d_x0 = torch.func.jvp(lambda s: term.sample(student, x_t, t, s, condition), (s,), (torch.ones_like(s),))
        way = TwoTimeMap(term.interpolant, x_t, t, s)
        exact = way.residual(x0, d_x0, term.teacher(way.state(x0), s, condition, "velocity"))
    errors = []
    for size in config.step_sizes:
        term.config = replace(term.config, step_size=size)
        errors.append([])
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                residual = term.gradient(student, x_t, t, s, condition)[2]
            errors[-1].append(float((residual - exact).norm() / exact.norm()))
    return float(exact.square().mean().sqrt()), errors


def main(arguments: list[str]) -> None:
    config = parse_settings(StepConfig, arguments)
    size, errors = measure(config)
    made = hardware(1)
    rows = [
        [f"{step:g}", *(f"{error:.3f}" for error in both)] for step, both in zip(config.step_sizes, errors, strict=True)
    ]
    text = markdown_table(["step in time", "float32", "bfloat16"], rows) + (
        f"\n\nRelative error of the residual R (root mean square {size:.2f}) after {config.updates} updates, one batch, "
        f"seed 0. {hardware_line(made)}\n"
    )
    print(text)
    folder = Path(config.output)
    write_json(
        folder / "flow_map_step.json", {"hardware": made, "steps": config.step_sizes, "errors": errors, "R": size}
    )
    write_text(folder / "flow_map_step.md", text)


if __name__ == "__main__":
    script_main(main)
