"""What a training needs in the memory of one device, from the networks' shapes alone: they may be on the meta device.

    parameters        4 bytes for each of the trained networks, their averages and the frozen networks (float32)
    gradients         4 bytes for each trained parameter
    Adam's moments    8 bytes for each trained parameter
    activations       what autograd keeps for the backward passes that are open at one time

Left out: the libraries' workspaces, the allocator's fragments, the communication of several devices.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..objectives import DistillationObjective
from ..pipelines import view_network
from .config import DistillConfig, TrainingConfig

FLOAT32 = 4


def parameter_count(networks: Iterable[nn.Module]) -> int:
    """Parameters of all the networks together."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def training_memory(
    trained: Sequence[nn.Module],
    frozen: Sequence[nn.Module],
    averaged: nn.Module,
    averages: int,
    activations: int,
    shards: int = 1,
) -> dict[str, int]:
    """Bytes on one device by purpose; their sum is the estimate.

    Args:
        trained: networks with an optimizer: the teacher in its own training; critic and student when distilling.
        frozen: networks that are only called: the teacher when distilling, a VAE.
        averaged: the network whose moving averages are kept.
        averages: how many.
        activations: bytes of `distillation_activations` or `teacher_activations`.
        shards: devices over which parameters, gradients, moments and averages are cut (FSDP); 1 with DDP.
    """
    learned = parameter_count(trained) * FLOAT32
    parts = {
        "trained parameters": learned,
        "gradients": learned,
        "Adam's moments": 2 * learned,
        f"moving averages ({averages})": averages * parameter_count([averaged]) * FLOAT32,
        "frozen networks": parameter_count(frozen) * FLOAT32,
    }
    return {name: -(-value // shards) for name, value in parts.items()} | {"activations": activations}


def average_count(settings: TrainingConfig) -> int:
    """Moving averages that a run keeps."""
    return 1 + len(settings.ema_extra) + len(settings.ema_power_sigmas)


def checkpoint_bytes(parts: dict[str, int]) -> int:
    """Of one checkpoint: trained networks, their moments and averages."""
    return sum(size for name, size in parts.items() if name not in ("gradients", "frozen networks", "activations"))


def graph_bytes(network: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd saves in `forward()` for its backward pass, each storage once, parameters and buffers left out.

    Args:
        network: whose parameters and buffers do not count.
        forward: computes something that depends on the network; on the meta device only shapes are computed. Its numbers
            mean nothing here: attention is not computed.
    """
    own = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(_storage(tensor), tensor)  # held, so that no other storage gets its address
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), _FusedAttentionMode(), hooks:
        output = forward()
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)
    del output
    return size


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel of attention keeps: its inputs, its output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


class _FusedAttentionMode(torch.overrides.TorchFunctionMode):
    """The meta device would choose the plain formula, which keeps the matrix of all pairs of tokens."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return _FusedAttention.apply(
            *(*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        )


def teacher_activations(network: ModelMixin, settings: TrainingConfig) -> int:
    """Bytes at the backward pass of one micro-batch of a teacher's training."""
    return _graph(network, settings, settings.per_device_train_batch_size)


def distillation_activations(
    network: ModelMixin, objective: DistillationObjective, adversarial: bool, settings: DistillConfig
) -> int:
    """Bytes at the larger of the two peaks of one iteration.

    * the critic's update: its graph of generated and, if used, real samples (and those with times of the adversarial
      term), while the student's graph waits for the generator's update;
    * the generator's update: the student's graph and, unless the objective detaches them, those of the frozen teacher and
      critic; guidance doubles their batch.

    With several micro-batches no graph of the student waits during the critic's updates.

    Args:
        network: the teacher's; critic and student are copies of it. A `head` is too small to count.
        objective, adversarial: what is played, and whether there is an adversarial term.
        settings: batch sizes, guidance and precision.
    """
    batch = settings.per_device_train_batch_size
    own_times = settings.adversarial.t_min is not None
    views = 1 + (objective.uses_real_data or (adversarial and not own_times)) + 2 * own_times
    student = _graph(network, settings, batch)
    waiting = student if settings.gradient_accumulation_steps == 1 else 0
    in_critic_update = waiting + _graph(network, settings, batch * views)
    passed = []  # samples that the frozen networks pass the gradient through
    if objective.needs_field_gradient:
        passed.append(batch * (1 + (settings.guidance_scale != 1)))
    if objective.needs_field_gradient or adversarial:
        passed.append(batch * (1 + own_times) * (1 + (settings.critic_guidance_scale != 1)))
    in_generator_update = student + sum(_graph(network, settings, count, frozen=True) for count in passed)
    return max(in_critic_update, in_generator_update)


def _graph(network: ModelMixin, settings: TrainingConfig, batch: int, frozen: bool = False) -> int:
    """Bytes of a forward of `batch` samples; `frozen`: the gradient goes through the network into its input."""
    described = json.dumps({k: v for k, v in network.config.items() if not k.startswith("_")}, sort_keys=True)
    constant, each = _graph_sizes(type(network), described, frozen)
    size = constant + batch * each
    # bfloat16: activations take about half, and autocast keeps copies of the weights.
    return size // 2 + parameter_count([network]) * 2 if settings.mixed_precision == "bf16" else size


@functools.lru_cache(maxsize=32)
def _graph_sizes(cls: type[ModelMixin], described: str, frozen: bool) -> tuple[int, int]:
    """`graph_bytes` of a forward: what does not depend on the batch (normalised weights), and what each sample adds.

    Args:
        cls, described: the network's class and, as JSON, its config; a copy is built on the meta device.
        frozen: see `_graph`.
    """
    with torch.device("meta"):
        network = cls.from_config(json.loads(described)).requires_grad_(not frozen)
        view = view_network(network)

        def size(batch: int) -> int:
            x = torch.zeros(batch, *view.sample_shape, requires_grad=frozen)
            t, labels = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
            channels = view.condition_channels
            seen = {"condition": torch.zeros(batch, channels, *view.sample_shape[1:])} if channels else {}
            return graph_bytes(network, lambda: view(x, t, labels, **seen))

        one, two = size(1), size(2)
    return 2 * one - two, two - one


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
