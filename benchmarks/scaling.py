#!/usr/bin/env python
"""Memory, communication and expected throughput of distilling SiT on several GPUs: the tables of docs/scaling.md.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --batch 128 --utilization 0.3

Networks are built on torch's meta device; nothing is measured. Memory is the estimate that `--dry_run` prints. All settings:
`python benchmarks/scaling.py --help`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_tools import markdown_table
from torch.utils.flop_counter import FlopCounterMode

from si_distill.models import SiTTransformer2DModel
from si_distill.settings import at_least, parse_settings, positive, script_main, setting
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.communication import transfers
from si_distill.training.dry_run.memory import Devices, distillation_activations, parameter_count, training_memory

RECIPE = Path(__file__).parent.parent / "configs/imagenet256/distill.yaml"
SIZES = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2")


@dataclass
class ScalingConfig:
    """Settings of the tables; the defaults' sources are in docs/scaling.md."""

    batch: int = setting(32, "Samples per GPU.")
    peak: float = setting(989.4e12, "Operations per second of a GPU in bfloat16, dense.")
    utilization: float = setting(0.4, "Share of these that training reaches on one GPU.")
    node: int = setting(8, "GPUs of a node.")
    node_bandwidth: float = setting(450e9, "Bytes per second that a GPU sends within its node.")
    network_bandwidth: float = setting(50e9, "Bytes per second that a GPU sends between nodes.")

    def __post_init__(self) -> None:
        for name in ("batch", "node"):
            at_least(name, getattr(self, name), 1)
        for name in ("peak", "utilization", "node_bandwidth", "network_bandwidth"):
            positive(name, getattr(self, name))


def recipe(batch: int) -> DistillConfig:
    """The settings of the report's distillation of SiT-XL/2, in bfloat16."""
    return parse_settings(DistillConfig, ["--config", str(RECIPE), "--per_device_train_batch_size", str(batch)])


def network_of(preset: str) -> SiTTransformer2DModel:
    """A network of the size, on the meta device."""
    with torch.device("meta"):
        return SiTTransformer2DModel.from_preset(preset, learn_sigma=True)


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def memory_table(config: ScalingConfig) -> str:
    """GiB per GPU; totals with and without gradient checkpointing."""
    kinds = {"DDP": Devices(8), "FSDP2, 8 GPUs": Devices(8, True), "FSDP2, 64 GPUs": Devices(64, True)}
    rows = []
    for preset in SIZES:
        for name, devices in kinds.items():
            found = []
            for checkpointing in (False, True):
                settings = replace(recipe(config.batch), gradient_checkpointing=checkpointing)
                networks = [network_of(preset) for _ in range(3)]
                objective = settings.build_objective()
                activations = distillation_activations(networks[0], objective, False, settings, devices.sharded)
                found.append(training_memory(networks[:2], networks[2], networks[1], settings, activations, devices))
            fixed = [gib(size) for part, size in found[0].items() if part not in ("activations", "gathered blocks")]
            gathered = gib(found[0].get("gathered blocks", 0))
            activations = [gib(parts["activations"]) for parts in found]
            totals = [gib(sum(parts.values())) for parts in found]
            rows.append([preset, name, *fixed, gathered, *activations, *totals])
    columns = ["", "", "weights", "gradients", "Adam", "average", "teacher", "gathered", "activations", "checkpointed"]
    return markdown_table([*columns, "**sum**", "**sum, checkpointed**"], rows)


def communication_table(config: ScalingConfig) -> str:
    """GB that each GPU sends in an iteration."""
    rows = []
    for preset in SIZES:
        parameters = parameter_count([network_of(preset)])
        settings = recipe(config.batch)
        for name, devices in {"DDP": Devices(8), "FSDP2": Devices(8, sharded=True)}.items():
            found = transfers(parameters, settings.build_objective(), settings, devices)
            words = "; ".join(f"{t.network}: {t.times} × {t.operation} of {t.size / 1e9:.2f}" for t in found)
            sent = [f"{sum(t.sent(count) for t in found) / 1e9:.1f}" for count in (8, 64)]
            rows.append([preset, name, words, *sent])
    return markdown_table(["", "", "operations, GB", "sent by each of 8", "of 64"], rows)


def forward_operations(network: SiTTransformer2DModel) -> int:
    """Floating-point operations of a forward of one sample, a multiplication and an addition being two."""
    shape = (1, network.config.in_channels, network.config.sample_size, network.config.sample_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape, device="meta"), 0.5, torch.zeros(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def forwards(settings: DistillConfig) -> int:
    """Forwards of a sample in an iteration of a detached objective, a backward being two: those of student and critic with
    their backwards, the guided teacher and the critic that judge.
    """
    judging = 1 + (settings.guidance_scale != 1) + 1
    return 3 * settings.critic_steps + settings.generator_steps * (3 + judging)


def throughput_table(config: ScalingConfig) -> str:
    """Images per second: from no overlap of communication and computation to a complete one."""
    rows = []
    for preset in SIZES:
        network, settings = network_of(preset), recipe(config.batch)
        operations = forward_operations(network) * forwards(settings)
        computing = config.batch * operations / (config.peak * config.utilization)
        cells = [preset, f"{operations / 1e12:.2f}", f"{config.batch / computing:.0f}"]
        for sharded in (False, True):
            for count in (8, 64):
                devices = Devices(count, sharded)
                found = transfers(parameter_count([network]), settings.build_objective(), settings, devices)
                bandwidth = config.node_bandwidth if count <= config.node else config.network_bandwidth
                sending = sum(transfer.sent(count) for transfer in found) / bandwidth
                slow, fast = (config.batch * count / time for time in (computing + sending, max(computing, sending)))
                cells.append(f"{slow:.0f} to {fast:.0f}")
        rows.append(cells)
    columns = ["", "TFLOP per image", "1 GPU", "8, DDP", "64, DDP", "8, FSDP2", "64, FSDP2"]
    return markdown_table(columns, rows)


def tables(config: ScalingConfig) -> dict[str, str]:
    """Title → table."""
    return {
        f"Memory: GiB per GPU, batch {config.batch} per GPU": memory_table(config),
        "Communication of one iteration: GB": communication_table(config),
        f"Expected images per second, batch {config.batch} per GPU": throughput_table(config),
    }


def main(argv: list[str]) -> None:
    config = parse_settings(ScalingConfig, argv, __doc__)
    print("\n\n".join(f"### {title}\n\n{table}" for title, table in tables(config).items()))


if __name__ == "__main__":
    script_main(main)
