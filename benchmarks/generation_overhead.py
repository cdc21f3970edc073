#!/usr/bin/env python
"""What the one-step pipeline costs next to the network's forward: labels, noise, the scheduler's step, the output.

    python benchmarks/generation_overhead.py
    python benchmarks/generation_overhead.py --device cuda --preset SiT-XL/2 --dtype bfloat16

A bare forward and calls of the pipeline take turns; the table has medians. "Outside the network" is the part of the same
call that is not its forward, by clocks around it, the device being waited for: it is finer than the difference of two calls.
All settings: `python benchmarks/generation_overhead.py --help`.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text
from iteration_loops import randomize_zeros

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.models import SiTTransformer2DModel
from si_distill.settings import at_least, parse_settings, script_main, setting

#: Latents as the network gives them, and images in [0, 1] of a network on pixels.
OUTPUT_TYPES = ("latent", "pt")


@dataclass
class OverheadConfig:
    """Settings of the benchmark."""

    preset: str = setting("SiT-S/2", "Size of the network.")
    model: dict = setting({}, "Arguments of the network other than the size's.")
    batch: int = setting(64, "Images of a call.")
    dtype: str = setting("float32", "The network's.", ("float32", "bfloat16"))
    device: str = setting("cpu", "Where.", ("cpu", "cuda"))
    threads: int = setting(os.cpu_count() or 1, "Threads of the CPU.")
    rounds: int = setting(9, "Measured calls of each kind, after two that are not.")
    output: str = setting("benchmarks/results", "Folder of generation_overhead_DEVICE.md and .json.")

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "rounds"):
            at_least(name, getattr(self, name), 1)


class Clock:
    """Seconds of calls, and of the network's forwards within them.

    Args:
        network: the module.
        device: waited for before each look at the clock.
    """

    def __init__(self, network: torch.nn.Module, device: str):
        self.device, self.inside = device, 0.0
        network.register_forward_pre_hook(lambda *_: self._enter())
        network.register_forward_hook(lambda *_: self._leave())

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _enter(self) -> None:
        self._entered = self.now()

    def _leave(self) -> None:
        self.inside += self.now() - self._entered

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a call, and of these outside the network."""
        self.inside, started = 0.0, self.now()
        call()
        seconds = self.now() - started
        return seconds, seconds - self.inside


@torch.no_grad()
def measure(config: OverheadConfig) -> dict[str, list[tuple[float, float]]]:
    """Of each kind of call, the (seconds, seconds outside the network) of every round."""
    torch.manual_seed(0)
    network = SiTTransformer2DModel.from_preset(config.preset, learn_sigma=True, **config.model)
    randomize_zeros(network)
    # Diffusers' own `to` warns of networks that keep some layers in float32; this one has none.
    network = torch.nn.Module.to(network, config.device, getattr(torch, config.dtype)).eval()
    pipeline = OneStepInterpolantPipeline(network, StochasticInterpolantScheduler(init_time=1.0))
    labels = [n % network.config.num_classes for n in range(config.batch)]
    noise = torch.randn(config.batch, *pipeline.network.sample_shape, device=config.device, dtype=network.dtype)
    ones, classes = torch.ones(config.batch, device=config.device), torch.tensor(labels, device=config.device)

    def generate(output_type: str) -> object:
        return pipeline(labels, generator=torch.Generator().manual_seed(0), output_type=output_type)

    kinds = OUTPUT_TYPES if pipeline.network.sample_shape[0] <= 3 else ("latent",)  # latents are no pictures
    calls = {"bare forward": lambda: network(noise, ones, classes, return_dict=False)}
    calls |= {f'pipeline, output_type="{kind}"': lambda kind=kind: generate(kind) for kind in kinds}
    clock = Clock(network, config.device)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(2 + config.rounds):
        for name, call in calls.items():
            seconds = clock.time(call)
            if number >= 2:
                found[name].append(seconds)
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Medians as Markdown."""
    rows, (bare, *_) = [], found.values()
    for name, times in found.items():
        seconds, outside = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(own / other for (own, _), (other, _) in zip(times, bare, strict=True))
        rows.append([name, f"{1e3 * seconds:.1f}", f"{ratio:.3f}", f"{1e3 * outside:.2f}", f"{outside / seconds:.2%}"])
    return markdown_table(["", "ms", "of the bare forward", "ms outside the network", "share"], rows)


def main(argv: list[str]) -> None:
    config = parse_settings(OverheadConfig, argv, __doc__)
    torch.set_num_threads(config.threads)
    found = measure(config)
    facts = hardware(1, config.threads)
    text = (
        f"{table(found)}\n\n{config.preset}, batch {config.batch}, {config.dtype}, medians of {config.rounds} calls. "
        f"{hardware_line(facts)}"
    )
    path = Path(config.output) / f"generation_overhead_{config.device}"
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    write_json(path.with_suffix(".json"), {"settings": settings, "hardware": facts, "seconds": found})
    write_text(path.with_suffix(".md"), text + "\n")
    print(text)


if __name__ == "__main__":
    script_main(main)
