#!/usr/bin/env python
"""All that wants a GPU, in one command of a few minutes: correctness, speed, memory, and what each is next to its estimate.

    python benchmarks/on_gpu.py
    python benchmarks/on_gpu.py --small

It needs the installed package and this folder, no data and no network. Parts, each in a process of its own with a limit of
time; a part that fails or is late is named and the next one runs:

    agreement   one iteration of each trainer in float32 on the device against the CPU: losses, gradient norms, weights
    iteration   `iteration.py` for each size: ours in bfloat16, compiled, against the report's schedule in TF32, with the
                share of the measured rate of matrix products
    memory      peak of the allocator in a run of the trainer against what `--dry_run` estimates
    pipeline    `generation_overhead.py`: the one-step pipeline next to the bare forward
    sharding    the trainer under FSDP2 on one rank against the same run without it

Tables go to OUTPUT/on_gpu.md as soon as each is there. `--small` runs all of it on a CPU with tiny networks, for tests.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import hardware, hardware_line, markdown_table, write_text

from si_distill.settings import at_least, parse_settings, script_main, setting

HERE = Path(__file__).parent
PARTS = ("agreement", "iteration", "memory", "pipeline", "sharding")
TINY = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
#: A training of seconds, on the package's own digits.
SHORT = "--per_device_train_batch_size 8 --logging_steps 1 --eval_steps 1000 --save_steps 1000 --max_steps 3".split()


@dataclass
class OnGpuConfig:
    """Settings of the benchmark."""

    small: bool = setting(False, "On a CPU with tiny networks.")
    parts: list[str] = setting(list(PARTS), f"Of these: {', '.join(PARTS)}.")
    presets: list[str] = setting(["SiT-B/2", "SiT-XL/2"], "Sizes of `iteration`.")
    batch: int = setting(32, "Samples of an iteration.")
    seconds: int = setting(150, "Limit of each process.")
    output: str = setting("benchmarks/results", "Folder of on_gpu.md.")
    part: str | None = setting(None, "Internal: the part that this process is.", PARTS)

    def __post_init__(self) -> None:
        for name in ("batch", "seconds"):
            at_least(name, getattr(self, name), 1)

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"


def commands(config: OnGpuConfig, folder: Path) -> list[tuple[str, list[str], Path | None]]:
    """(title, command, the file that its table is in, or None if it prints it) of each process."""
    here = [sys.executable, str(HERE / "on_gpu.py"), "--batch", str(config.batch), "--output", str(folder)]
    here += ["--small"] if config.small else []
    model = ["--model", json.dumps(TINY)] if config.small else []
    device = ["--device", config.device, "--output", str(folder)]
    of_part: dict[str, list[tuple[str, list[str], Path | None]]] = {
        part: [(part, [*here, "--part", part], None)] for part in ("agreement", "memory", "sharding")
    }
    of_part["iteration"] = []
    for preset in ["SiT-S/2"] if config.small else config.presets:
        rounds = (
            ["--rounds", "2", "--warm_up", "1", "--matrix", "64"] if config.small else ["--rounds", "5", "--compile"]
        )
        name = f"iteration_{config.device}_{preset.lower().replace('/', '-')}.md"
        command = [sys.executable, str(HERE / "iteration.py"), "--preset", preset, "--batch", str(config.batch)]
        of_part["iteration"].append((f"iteration, {preset}", [*command, *rounds, *model, *device], folder / name))
    preset = "SiT-S/2" if config.small else config.presets[-1]
    command = [sys.executable, str(HERE / "generation_overhead.py"), "--preset", preset, "--batch", str(config.batch)]
    command += ["--dtype", "float32" if config.small else "bfloat16", *model, *device]
    of_part["pipeline"] = [("pipeline", command, folder / f"generation_overhead_{config.device}.md")]
    return [process for part in config.parts for process in of_part[part]]


def run_all(config: OnGpuConfig) -> str:
    """Runs the parts and writes the page after each; returns it."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    page = [f"# On one {'CPU, small' if config.small else 'GPU'}", hardware_line(hardware(1))]
    for title, command, file in commands(config, folder):
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=config.seconds)
            table = file.read_text(encoding="utf-8") if file and not done.returncode else done.stdout
            if done.returncode:
                table = f"Failed with exit code {done.returncode}:\n\n```\n{done.stderr.strip()[-1500:]}\n```"
        except subprocess.TimeoutExpired:
            table = f"Stopped after {config.seconds} s, the limit of a process (`--seconds`)."
        page.append(f"## {title.capitalize()}\n\n{table.strip()}\n\n{time.monotonic() - started:.0f} s in all.")
        write_text(folder / "on_gpu.md", "\n\n".join(page) + "\n")
        print(page[-1], flush=True)
    return "\n\n".join(page)


def trainings(config: OnGpuConfig, folder: Path, *further: str) -> dict[str, list[str]]:
    """The command lines of a teacher's and a student's training of three iterations on digits."""
    model = {
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "timestep_scale": 100.0,
    }
    teacher = ["--data.name", "digits", "--model", json.dumps(model), "--output_dir", str(folder / "teacher")]
    student = ["--objective", "realuid", "--data.name", "digits", "--teacher", str(folder / "teacher")]
    student += ["--adam_epsilon", "1e-3", "--output_dir", str(folder / "student")]
    return {name: [*words, *SHORT, *further] for name, words in (("teacher", teacher), ("student", student))}


def train(name: str, arguments: list[str]) -> Any:
    """A finished trainer."""
    from si_distill.training.config import TeacherConfig
    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.distillation.trainer import DistillationTrainer
    from si_distill.training.teacher import TeacherTrainer

    kinds = {"teacher": (TeacherTrainer, TeacherConfig), "student": (DistillationTrainer, DistillConfig)}
    trainer, settings = kinds[name]
    trainer = trainer(parse_settings(settings, arguments))
    trainer.train()
    return trainer


def apart(config: OnGpuConfig, name: str, arguments: list[str], **environment: str) -> Path:
    """A training in a process of its own, whose environment chooses the device; returns its folder."""
    code = "import sys, on_gpu; on_gpu.train(sys.argv[1], sys.argv[2:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return Path(arguments[arguments.index("--output_dir") + 1])


def compared(one: Path, other: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """Largest relative differences of the logs and largest absolute difference of the weights of two runs."""
    from safetensors.torch import load_file

    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    rows = []
    for column in columns:
        pairs = [(a[column], b[column]) for a, b in zip(*logs, strict=True)]
        rows.append([column, f"{max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs):.1e}"])
    weights = [load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (one, other)]
    difference = max((weights[0][key] - value).abs().max().item() for key, value in weights[1].items())
    return [*rows, ["weights, absolute", f"{difference:.1e}"]]


LOGGED = {
    "teacher": ("loss", "grad_norm"),
    "student": ("critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm"),
}
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def agreement(config: OnGpuConfig, folder: Path) -> str:
    rows = []
    for name in LOGGED:
        runs = []
        for place, environment in (("here", {"NVIDIA_TF32_OVERRIDE": "0"}), ("cpu", ON_CPU)):
            arguments = trainings(config, folder / place)[name]
            runs.append(apart(config, name, arguments, **environment))
        rows += [[name, *row] for row in compared(*runs, LOGGED[name])]
    table = markdown_table(["trainer", "what", "largest difference from the CPU"], rows)
    return f"{table}\n\nThree iterations in float32 without TF32, on digits, the student of each device's own teacher."


def memory(config: OnGpuConfig, folder: Path) -> str:
    import torch
    from iteration import IterationConfig, save_teacher
    from iteration_loops import RECIPE

    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.distillation.trainer import DistillationTrainer
    from si_distill.training.dry_run.memory import Devices, distillation_activations, training_memory

    preset = "SiT-S/2" if config.small else config.presets[0]
    save_teacher(IterationConfig(preset=preset, model=TINY if config.small else {}), str(folder / "teacher"))
    arguments = ["--config", str(RECIPE), "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "run")]
    arguments += ["--per_device_train_batch_size", str(config.batch), "--max_steps", "3", "--eval_steps", "1000"]
    settings = parse_settings(DistillConfig, [*arguments, "--save_steps", "1000", "--label_sampling", "uniform"])
    trainer = DistillationTrainer(settings)
    trainer.setup()
    if not config.small:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        trainer.iteration()
        trainer.step += 1
    peak = 0 if config.small else torch.cuda.max_memory_allocated()
    teacher = trainer.teacher_pipeline.transformer
    trained = [trainer.critic.unwrapped, trainer.generator.unwrapped]
    activations = distillation_activations(teacher, trainer.objective, trainer.adversarial is not None, settings, False)
    parts = training_memory(trained, teacher, trained[1], settings, activations, Devices())
    rows = [[name, f"{size / 2**30:.3f}"] for name, size in parts.items()]
    rows += [["sum, estimated", f"{sum(parts.values()) / 2**30:.3f}"]]
    rows += [["peak, measured", f"{peak / 2**30:.3f}" if peak else "not on a CPU"]]
    table = markdown_table(["", "GiB"], rows)
    return f"{table}\n\n{preset}, batch {config.batch}, {settings.mixed_precision}, configs/imagenet256/distill.yaml."


def sharding(config: OnGpuConfig, folder: Path) -> str:
    if config.small:
        return "Not on a CPU: Accelerate shards nothing on one of them (two are in tests/training/test_distributed.py)."
    sharded = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541",
    }  # fmt: skip
    apart(config, "teacher", trainings(config, folder)["teacher"])
    runs = []
    for kind, environment in (("sharded", sharded), ("plain", {})):
        arguments = trainings(config, folder)["student"]
        arguments[arguments.index("--output_dir") + 1] = str(folder / kind)
        runs.append(apart(config, "student", arguments, **environment))
    return markdown_table(["what", "largest difference from the run without FSDP2"], compared(*runs, LOGGED["student"]))


def main(argv: list[str]) -> None:
    import tempfile

    config = parse_settings(OnGpuConfig, argv, __doc__)
    if config.part is None:
        run_all(config)
        return
    with tempfile.TemporaryDirectory() as folder:
        print({"agreement": agreement, "memory": memory, "sharding": sharding}[config.part](config, Path(folder)))


if __name__ == "__main__":
    script_main(main)
