#!/usr/bin/env python
"""Times one distillation iteration (5 critic updates and 1 generator update) against the schedule of the seed.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --peer path/to/si-adistill --compile
    python benchmarks/iteration.py --device cuda --preset SiT-XL/2 --batch 32 --compile

Every row is a process of its own; the processes take turns, one iteration each, so that all see the same machine: the table
has the medians over the rounds, and the ratios are medians of the rounds' own ratios. The baseline is the loop of
`SiT/distill_ddp.py` in WladGrm/si-adistill: with `--peer` its own code, else its schedule on our network. The others are
iterations of `DistillationTrainer` with the settings of configs/imagenet256. Weights are random. Memory is the peak within
iterations: of CUDA's allocator, or on a CPU the process's resident size less that before the networks were built.
All settings: `python benchmarks/iteration.py --help`.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text
from iteration_loops import PEER_SCRIPT, Bench, Loop, randomize_zeros, serve
from tqdm.auto import tqdm

from si_distill.errors import InputError
from si_distill.settings import at_least, parse_settings, script_main, setting


@dataclass
class IterationConfig:
    """Settings of the benchmark."""

    preset: str = setting("SiT-S/2", "Size of the networks.")
    model: dict = setting({}, "Arguments of the network other than the size's.")
    batch: int = setting(4, "Samples of an iteration.")
    device: str = setting("cpu", "Where.", ("cpu", "cuda"))
    threads: int = setting(os.cpu_count() or 1, "Threads of the CPU.")
    rounds: int = setting(7, "Measured iterations of each row.")
    warm_up: int = setting(2, "Iterations of each row before them.")
    peer: str = setting("", "A checkout of WladGrm/si-adistill, whose own code is then the baseline.")
    compile: bool = setting(False, "Rows with --compile too.")
    rows: dict = setting({}, "Further rows: a name, and settings of training/train_distill.py as on its command line.")
    matrix: int | None = setting(None, "Side of the matrices whose product is the machine's rate; 4096, on CUDA 16384.")
    profile: bool = setting(False, "One more iteration of each row, whose operators are printed by their time.")
    output: str = setting("benchmarks/results", "Folder of iteration_DEVICE_SIZE.md and .json.")

    def __post_init__(self) -> None:
        self.matrix = self.matrix or (16384 if self.device == "cuda" else 4096)
        for name in ("batch", "threads", "rounds", "warm_up", "matrix"):
            at_least(name, getattr(self, name), 1)
        if self.peer and self.model:
            raise InputError("`peer` has the published sizes only: leave `model` out.")
        if self.peer and not (Path(self.peer) / PEER_SCRIPT).is_file():
            raise InputError(f"`peer` {self.peer} is no checkout of WladGrm/si-adistill: it has no {PEER_SCRIPT}.")


def loops(config: IterationConfig) -> list[Loop]:
    """The rows: first the baseline, last the products of matrices."""
    baseline = "tf32" if config.device == "cuda" else "fp32"
    kind = "peer" if config.peer else "schedule"
    rows = [Loop(f"baseline, {baseline}", kind, baseline)]
    if config.device == "cpu":
        rows.append(Loop("ours, fp32", "ours", "fp32"))
        if config.compile:
            rows.append(Loop("ours, fp32, compiled", "ours", "fp32", ("--compile",)))
    rows.append(Loop("ours, bf16", "ours", "bf16"))
    if config.compile:
        rows.append(Loop("ours, bf16, compiled", "ours", "bf16", ("--compile",)))
    own = "bf16" if config.device == "cuda" else "fp32"
    rows += [
        Loop(f"ours, {own}, {name}", "ours", own, tuple(str(words).split())) for name, words in config.rows.items()
    ]
    return rows + [Loop(f"matrix product, {p}", "matrices", p) for p in dict.fromkeys((baseline, "bf16"))]


class Processes:
    """One process for each row, as a context manager; one works at a time."""

    def __init__(self, rows: list[Loop], bench: Bench):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["iteration_loops", "si_distill.training.distillation.trainer"])
        self._running = {}
        for row in rows:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, row, bench), daemon=True)
            process.start()
            there.close()
            self._running[row] = (process, here)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error) -> None:
        for process, connection in self._running.values():
            if process.is_alive():
                try:
                    connection.send(None)
                    process.join(timeout=30)
                except OSError:
                    pass
                process.terminate()

    def iterate(self, row: Loop, request: str) -> dict[str, Any]:
        """Runs one iteration (see `Pace`).

        Raises:
            InputError: with the words of the process, when it failed.
        """
        process, connection = self._running[row]
        try:
            connection.send(request)
            reply = connection.recv()
        except (EOFError, OSError) as error:
            raise InputError(f"{row.name}: its process ended with {process.exitcode}.") from error
        if "error" in reply:
            print(reply["traceback"], file=sys.stderr)
            raise InputError(reply["error"])
        return reply


def measure(config: IterationConfig, teacher: str) -> list[dict[str, Any]]:
    """Every row with its times (s), peak memory (bytes) and floating-point operations."""
    rows = loops(config)
    bench = Bench(
        teacher, config.preset, config.batch, config.device, config.threads, config.peer, matrix=config.matrix
    )
    found: dict[Loop, list[dict[str, float]]] = {row: [] for row in rows}
    flops: dict[Loop, float] = {}
    with Processes(rows, bench) as processes, tqdm(total=len(rows) * (config.warm_up + config.rounds)) as bar:
        for number in range(config.warm_up + config.rounds):
            for row in rows:
                bar.set_description(row.name)
                # Counted on the way: operators inside a compiled graph are not seen, but there are as many.
                counted = number == 0 and row.kind != "matrices" and "--compile" not in row.settings
                reply = processes.iterate(row, "count" if counted else "time")
                if counted:
                    flops[row] = reply["flops"]
                if number >= config.warm_up:
                    found[row].append(reply)
                bar.update()
        if config.profile:
            for row in rows:
                if row.kind != "matrices":
                    print(f"\n{row.name}\n{processes.iterate(row, 'profile')['profile']}")
    eager = next(flops[row] for row in rows if row.kind == "ours")
    return [
        {
            **asdict(row),
            "seconds": [reply["seconds"] for reply in replies],
            "memory": max(reply["memory"] for reply in replies),
            "flops": 2 * config.matrix**3 if row.kind == "matrices" else flops.get(row, eager),
        }
        for row, replies in found.items()
    ]


def table(config: IterationConfig, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    baseline = rows[0]
    rates = {row["precision"]: row["flops"] / statistics.median(row["seconds"]) for row in rows[-2:]}
    lines = []
    for row in rows:
        seconds = statistics.median(row["seconds"])
        rate = row["flops"] / seconds
        cells = [row["name"], f"{seconds:.3g}"]
        if row["kind"] == "matrices":
            lines.append([*cells, "", "", "", "", f"{rate / 1e12:.3g}", ""])
            continue
        ratios = [b / o for b, o in zip(baseline["seconds"], row["seconds"], strict=True)]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if row is not baseline else ""
        lines.append(
            [
                *cells,
                f"{config.batch / seconds:.3g}",
                f"{statistics.median(ratios):.2f}{spread}",
                f"{row['memory'] / 2**30:.2f}",
                f"{row['flops'] / 1e12:.3g}",
                f"{rate / 1e12:.3g}",
                f"{rate / rates[row['precision']]:.0%}",
            ]
        )
    columns = ["", "s / iteration", "images / s", "times the baseline", "peak memory, GiB", "TFLOP / iteration"]
    return markdown_table([*columns, "TFLOP / s", "of the matrix rate"], lines)


def save_teacher(config: IterationConfig, folder: str) -> None:
    """A teacher's pipeline with random weights."""
    import torch

    from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
    from si_distill.models import SiTTransformer2DModel

    torch.manual_seed(0)
    try:
        network = SiTTransformer2DModel.from_preset(config.preset, learn_sigma=True, **config.model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    randomize_zeros(network)
    InterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(folder)


def main(argv: list[str]) -> None:
    config = parse_settings(IterationConfig, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(config, folder)
        rows = measure(config, folder)
    facts = hardware(1, config.threads)
    baseline = "the peer's own code" if config.peer else "its schedule on our network"
    text = (
        f"{table(config, rows)}\n\n{config.preset}, batch {config.batch}, medians of {config.rounds} interleaved "
        f"iterations; the baseline is {baseline}. {hardware_line(facts)}"
    )
    size = config.preset.lower().replace("/", "-")
    path = Path(config.output) / f"iteration_{config.device}_{size}"
    settings = {name: value for name, value in asdict(config).items() if name not in ("peer", "profile", "output")}
    write_json(path.with_suffix(".json"), {"settings": settings, "hardware": facts, "rows": rows})
    write_text(path.with_suffix(".md"), text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    script_main(main)
