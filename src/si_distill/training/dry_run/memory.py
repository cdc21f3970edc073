"""What a training needs in the memory of one device, from the networks' shapes alone: they may be on the meta device.

    parameters        4 bytes for each of the trained networks and their averages; 4 of the frozen networks, 2 of a teacher
                      that runs in bfloat16
                      With adapters the teacher is their base, 4 bytes or in bfloat16 2, and the trained networks are the
                      adapters alone, which FSDP2 does not cut.
    gradients         4 bytes for each parameter of the largest trained network, which are cleared after each update; with
                      DDP of all trained networks, whose gradients live in its buckets
    Adam's moments    8 bytes for each trained parameter; about 2 in 8 bits
    activations       what autograd keeps for the backward passes that are open at one time
    gathered blocks   with FSDP2, which cuts all of the above but the activations over the devices: the weights and gradients
                      that are whole for a while

Left out: the libraries' workspaces, the allocator's fragments.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ...objectives import DistillationObjective
from ...pipelines import Condition, view_network
from ...text_to_image.network import TextNetwork, shares_base
from ..config import TrainingConfig
from ..distillation.config import DistillConfig
from ..optimizers import moment_bytes
from ..parallel.blocks import blocks, checkpoint_blocks, half_precision_weights, has_dropout
from .graphs import graph_sizes
from .text import text_graph_sizes

FLOAT32, BFLOAT16 = 4, 2
#: Parts of the memory, next to the averages, that are in a checkpoint.
CHECKPOINTED = ("trained parameters", "Adam's moments")


def parameter_count(networks: Iterable[nn.Module]) -> int:
    """Parameters of all the networks together."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


@dataclass(frozen=True)
class Devices:
    """Over what a run is spread.

    Args:
        count: processes, one on each device.
        sharded: whether the networks are cut over them (FSDP2); else each device has them whole (DDP).
    """

    count: int = 1
    sharded: bool = False

    @classmethod
    def of_launcher(cls) -> "Devices":
        """As a launcher's environment says."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(count, count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true")


def training_memory(
    trained: Sequence[nn.Module],
    teacher: nn.Module | None,
    averaged: nn.Module,
    settings: TrainingConfig,
    activations: int,
    devices: Devices,
    autoencoder: nn.Module | None = None,
) -> dict[str, int]:
    """Bytes on one device by purpose; their sum is the estimate.

    Args:
        trained: networks with an optimizer: the teacher in its own training; critic and student when distilling.
        teacher: the frozen network of a distillation.
        averaged: the network whose moving averages are kept.
        settings: their number, and the precision.
        activations: bytes of `distillation_activations` or `teacher_activations`.
        devices: over which parameters, gradients, moments and averages are cut, or not.
        autoencoder: frozen too, and never cut.
    """
    counts = [parameter_count([network]) for network in trained]
    whole_gradients = devices.count > 1 and not devices.sharded
    averages = average_count(settings)
    parts = {
        "trained parameters": sum(counts) * FLOAT32,
        "gradients": (sum(counts) if whole_gradients else max(counts)) * FLOAT32,
        "Adam's moments": sum(moment_bytes(network, settings.use_8bit_adam) for network in trained),
        f"moving averages ({averages})": averages * parameter_count([averaged]) * FLOAT32,
        "teacher": 0 if teacher is None else teacher_bytes(teacher, settings, devices),
    }
    shards = devices.count if devices.sharded else 1
    cut = {"teacher"} if shares_base(averaged) else parts.keys()  # adapters are whole on every device
    parts = {name: -(-size // shards) if name in cut else size for name, size in parts.items()}
    if autoencoder is not None:
        parts["autoencoder"] = parameter_count([autoencoder]) * FLOAT32
    if devices.sharded:
        parts["gathered blocks"] = _gathered([*trained, *([] if teacher is None else [teacher])], settings)
    return parts | {"activations": activations}


def teacher_bytes(teacher: nn.Module, settings: TrainingConfig, devices: Devices) -> int:
    """Bytes of a frozen teacher's weights, all devices together where it is cut."""
    if isinstance(teacher, TextNetwork) and teacher.adapters is not None:
        own = sum(p.numel() for name, p in teacher.base.named_parameters() if ".lora_" not in name)
        return own * (BFLOAT16 if settings.mixed_precision == "bf16" else FLOAT32)
    whole = parameter_count([teacher]) * FLOAT32
    if settings.mixed_precision != "bf16" or devices.sharded:
        return whole
    return whole - sum(p.numel() for p in half_precision_weights(teacher)) * (FLOAT32 - BFLOAT16)


def _gathered(networks: Sequence[nn.Module], settings: TrainingConfig) -> int:
    """Bytes of what FSDP2 has whole on each device.

    Of every network what lies outside its blocks, which stays after the first forward; of one network two blocks (the next
    one is gathered ahead), with gradients and their float32 copies to be summed.
    """
    width = BFLOAT16 if settings.mixed_precision == "bf16" else FLOAT32
    outside, largest = 0, 0
    for network in networks:
        sizes = [parameter_count([block]) for block in blocks(network)]
        outside += parameter_count([network]) - sum(sizes)
        largest = max([largest, *sizes])
    return outside * width + 2 * largest * (2 * width + FLOAT32)


def average_count(settings: TrainingConfig) -> int:
    """Moving averages that a run keeps."""
    return 1 + len(settings.ema_extra) + len(settings.ema_power_sigmas)


def checkpoint_bytes(parts: dict[str, int], devices: Devices) -> int:
    """Of one checkpoint: trained networks, their moments and averages; of all devices together where they are cut."""
    saved = [size for name, size in parts.items() if name in CHECKPOINTED or name.startswith("moving averages")]
    return sum(saved) * (devices.count if devices.sharded else 1)


def teacher_activations(network: ModelMixin, settings: TrainingConfig, sharded: bool = False) -> int:
    """Bytes at the backward pass of one micro-batch of a teacher's training; `sharded`: cut over devices."""
    return sum(_graph(network, settings, settings.per_device_train_batch_size, sharded))


def distillation_activations(
    network: ModelMixin,
    objective: DistillationObjective,
    adversarial: bool,
    settings: DistillConfig,
    sharded: bool = False,
) -> int:
    """Bytes at the largest of the peaks of one iteration.

    * the critic's update: its graph of generated and, if used, real samples (and those with times or noise of the
      adversarial term), while the student's graph waits for its own update, if one forward serves both;
    * the student's update: its graph and, unless the objective detaches them, those of the frozen teacher and critic;
      guidance doubles their batch;
    * the flow-map term after it: the student's graph of the term's own images.

    Args:
        network: the teacher's; critic and student are copies of it. A `head` is too small to count.
        objective, adversarial: what is played, and whether there is an adversarial term.
        settings: batch sizes, guidance, precision and checkpointing.
        sharded: whether the networks are cut over devices.
    """
    batch = settings.per_device_train_batch_size
    term, on_teacher = settings.adversarial, adversarial and settings.adversarial.features == "teacher"
    own = adversarial and (term.t_min is not None or term.own_noise)
    views = 1 + objective.uses_real_data
    if adversarial and not on_teacher:
        views += own + (own or term.real_apart or not objective.uses_real_data)

    def graph(samples: int, frozen: bool = False) -> tuple[int, int]:
        return _graph(network, settings, samples, sharded, frozen)

    student = graph(batch * (1 + (settings.student_guidance_scale != 1)))
    drops = settings.dropout if settings.dropout is not None else has_dropout(network)
    one_forward = settings.critic_draws == "shared" and settings.gradient_accumulation_steps == 1 and not drops
    waiting = [student] if one_forward and not settings.generator_first else []
    in_critic_update = [*waiting, graph(batch * views * (1 + (settings.critic_training_guidance_scale != 1)))]
    in_generator_update = [student]
    if objective.needs_field_gradient or on_teacher:
        looks = objective.needs_field_gradient + (on_teacher and (own or not objective.needs_field_gradient))
        in_generator_update.append(graph(batch * looks * (1 + (settings.guidance_scale != 1)), frozen=True))
    if objective.needs_field_gradient or (adversarial and not on_teacher):
        guided = 1 + (settings.critic_guidance_scale != 1)
        in_generator_update.append(graph(batch * (1 + (own and not on_teacher)) * guided, frozen=True))
    in_flow_map = []
    if settings.flow_map.weight:
        guided = 1 + (settings.student_guidance_scale != 1)
        in_flow_map = [graph(ceil(batch * settings.flow_map.ratio) * guided)]
    # Every graph waits with what it keeps; one block at a time is run again.
    return max(
        sum(kept for kept, _ in graphs) + max(again for _, again in graphs)
        for graphs in (in_critic_update, in_generator_update, in_flow_map)
        if graphs
    )


def _graph(
    network: ModelMixin, settings: TrainingConfig, batch: int, sharded: bool, frozen: bool = False
) -> tuple[int, int]:
    """Bytes that a forward of `batch` samples keeps, and those of the block that is run again when it is checkpointed.

    Args:
        network: the module.
        settings: precision and checkpointing.
        batch: samples.
        sharded: whether the network is cut over devices.
        frozen: the gradient goes through the network into its input.
    """
    if isinstance(network, TextNetwork):
        sizes = text_graph_sizes(network, settings.gradient_checkpointing, frozen)
    else:
        described = json.dumps({k: v for k, v in network.config.items() if not k.startswith("_")}, sort_keys=True)
        sizes = _graph_sizes(type(network), described, frozen, settings.gradient_checkpointing)
    kept, again = (constant + batch * each for constant, each in sizes)
    if settings.mixed_precision != "bf16":
        return kept, again
    # bfloat16: activations take about half. Autocast keeps copies of the weights, unless FSDP2 gathers such copies.
    copies = [network] if not settings.gradient_checkpointing else blocks(network)[:1]
    return kept // 2 + (0 if sharded else parameter_count(copies) * BFLOAT16), again // 2


@functools.lru_cache(maxsize=32)
def _graph_sizes(
    cls: type[ModelMixin], described: str, frozen: bool, checkpointed: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a forward keeps, and what its largest block keeps when that is run again: each what does not depend on the batch
    (normalised weights), and what a sample adds.

    Args:
        cls, described: the network's class and, as JSON, its config; a copy is built on the meta device.
        frozen, checkpointed: see `_graph`.
    """
    with torch.device("meta"):
        network = cls.from_config(json.loads(described)).requires_grad_(not frozen)
        view = view_network(network)

        def forward(batch: int) -> object:
            x = torch.zeros(batch, *view.sample_shape, requires_grad=frozen)
            t, labels = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
            channels = view.condition_channels
            image = torch.zeros(batch, channels, *view.sample_shape[1:]) if channels else None
            return view(x, t, Condition(labels, image=image))

        return graph_sizes(network, forward, functools.partial(checkpoint_blocks, network) if checkpointed else None)
