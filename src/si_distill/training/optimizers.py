"""Adam, with its moments in 32 or in 8 bits."""

import importlib.metadata
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .config import TrainingConfig
from .parallel.sharding import optimizer_groups

#: The first release of bitsandbytes whose 8-bit optimizers run on CPUs too.
BITSANDBYTES = (0, 50)
#: bitsandbytes keeps the moments of smaller tensors in 32 bits, and scales larger ones in blocks of this many values.
SMALLEST_IN_8_BITS, BLOCK = 4096, 256


@dataclass(frozen=True)
class OptimizerSettings:
    """How one network is updated.

    Args:
        learning_rate: the peak.
        lr_warmup_steps: updates of linear warm-up.
        adam_beta1, adam_beta2, adam_epsilon, weight_decay: of AdamW; without decay it is Adam.
        max_grad_norm: limit of the gradient's norm.
        total_updates: length of a falling schedule.
        max_grad_value: each value of the gradient is cut to ± this, before the norm is; None is no cut.
    """

    learning_rate: float
    lr_warmup_steps: int
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    total_updates: int
    max_grad_value: float | None = None

    @classmethod
    def of(cls, values: dict[str, Any], **own: float | None) -> "OptimizerSettings":
        """From settings by their names in `TrainingConfig`, among others, and those that are no settings."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values}, **own)


def check_8bit_adam(settings: TrainingConfig, sharded: bool) -> None:
    """Refuses `use_8bit_adam` where it cannot work.

    Raises:
        InputError: under FSDP2, without bitsandbytes, or with a release that is too old.
    """
    if not settings.use_8bit_adam:
        return
    if sharded:
        raise InputError(
            "`use_8bit_adam` cannot be used with FSDP2: bitsandbytes updates whole tensors, and here each process has a "
            "part of them (of their moments too). Set it to false, or launch with configs/accelerate/ddp.yaml."
        )
    needed = ".".join(map(str, BITSANDBYTES))
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "`use_8bit_adam` needs bitsandbytes, which is not installed: pip install 'si_distill[8bit]', or set it to false."
        ) from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < BITSANDBYTES:  # 1.0rc1 is a version too
        raise InputError(
            f"`use_8bit_adam` needs bitsandbytes {needed} or later, and {found} is installed: pip install -U bitsandbytes."
        )


def build_adam(
    parameters: Iterable[nn.Parameter], optimizer: OptimizerSettings, in_8_bits: bool
) -> torch.optim.Optimizer:
    """Adam, or AdamW if there is a weight decay.

    Args:
        parameters: on their device.
        optimizer: of their network.
        in_8_bits: whether moments are kept in 8 bits, scaled block by block (Dettmers et al. 2022, "8-bit Optimizers via
            Block-wise Quantization").
    """
    common: dict[str, Any] = dict(
        lr=optimizer.learning_rate,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_epsilon,
        weight_decay=optimizer.weight_decay,
    )
    if in_8_bits:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(optimizer_groups(parameters), **common)
    cls = torch.optim.AdamW if optimizer.weight_decay else torch.optim.Adam
    return cls(optimizer_groups(parameters), fused=True, **common)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Adam's state before its first step.

    Saving sharded moments that are not there yet would make an idle step to have them, and count it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def moment_bytes(network: nn.Module, in_8_bits: bool) -> int:
    """Bytes of both moments of all parameters of a network; it may be on the meta device."""
    sizes = [parameter.numel() for parameter in network.parameters()]
    if not in_8_bits:
        return 2 * 4 * sum(sizes)
    return sum(2 * (4 * size if size < SMALLEST_IN_8_BITS else size + 4 * math.ceil(size / BLOCK)) for size in sizes)
