"""A network that is trained: its module, optimizer, schedule, and the update with clipping."""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from ..text_to_image.network import has_text, shares_base
from .config import TrainingConfig
from .optimizers import OptimizerSettings, build_adam, start_moments
from .parallel.blocks import prepare_blocks
from .parallel.sharding import average_replicated, clip_grad_norm, optimizer_groups, reshard, shard

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


class TrainedNetwork:
    """Wraps a network for training on every rank. It is in evaluation mode but inside `training()`.

    Args:
        accelerator: prepares the network and its optimizer, one pair at a time (what FSDP2 asks for).
        network: the module, on the CPU.
        settings: of the run: blocks, micro-batches and the shape of the schedule.
        optimizer: of this network.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, settings: TrainingConfig, optimizer: OptimizerSettings
    ):
        self.accelerator = accelerator
        self.max_grad_norm = optimizer.max_grad_norm
        self.max_grad_value = optimizer.max_grad_value
        self.accumulation = settings.gradient_accumulation_steps
        network.requires_grad_(True).eval()
        prepare_blocks(network, settings)
        self.sharded = accelerator.is_fsdp2 and not shares_base(network)
        # Parts of text-to-image networks have no gradient, which DistributedDataParallel takes for an error.
        self.averaged = self.sharded or has_text(network)
        network = shard(accelerator, network) if self.sharded else network.to(accelerator.device)
        adam = build_adam(network.parameters(), optimizer, settings.use_8bit_adam)
        if self.averaged:
            if accelerator.is_fsdp2:
                start_moments(adam)
            # Not by `prepare`, which finds an optimizer's parameters by the addresses of their shards: empty ones share one.
            accelerator._models.append(network)
            self.module, self.optimizer = network, accelerator.prepare_optimizer(adam)
        else:
            self.module, self.optimizer = accelerator.prepare(network, adam)
        # A prepared scheduler would step once per process: the raw one is stepped by hand, once per update.
        self.schedule = get_scheduler(
            _SCHEDULES[settings.lr_scheduler_type],
            self.optimizer.optimizer,
            num_warmup_steps=optimizer.lr_warmup_steps,
            num_training_steps=optimizer.total_updates,
        )
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    @property
    def unwrapped(self) -> nn.Module:
        """The network itself, without the distributed wrapper."""
        return self.accelerator.unwrap_model(self.module)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The network in training mode, for its own update: until its backward pass is done, in which checkpointed blocks
        run again.
        """
        self.module.train()
        try:
            yield
        finally:
            self.module.eval()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The bare network with gradients flowing through it but not into it."""
        self._let_gradients_in(False)
        try:
            yield self.unwrapped
        finally:
            self._let_gradients_in(True)

    def _let_gradients_in(self, wanted: bool) -> None:
        # What a forward has left gathered keeps the flag that it was gathered with: without a backward pass through the
        # frozen network (detached objectives), its outermost layers would never learn again.
        reshard(self.module)
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch."""
        self.accelerator.backward(loss / self.accumulation)

    def forward_context(self, micro_batch: int) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: no gradient exchange before the last one."""
        if micro_batch < self.accumulation - 1:
            return self.accelerator.no_sync(self.module)
        return contextlib.nullcontext()

    def update(self) -> tuple[torch.Tensor, bool]:
        """Clips, steps and clears the gradients.

        Returns:
            The gradient norm before clipping, equal on all ranks, and whether the update was done: gradients that are
            not finite are thrown away, alike on all ranks.
        """
        if self.averaged and self.accelerator.num_processes > 1:
            average_replicated(self.accelerator, self.parameters)
        cut_values = self.max_grad_value is not None
        # With an infinite limit this only measures: cut values would hide gradients that are infinite.
        norm = clip_grad_norm(self.accelerator, self.parameters, math.inf if cut_values else self.max_grad_norm)
        if cut_values:
            for group in optimizer_groups(self.parameters):
                torch.nn.utils.clip_grad_value_(group["params"], self.max_grad_value)
            clip_grad_norm(self.accelerator, self.parameters, self.max_grad_norm)
        applied = bool(torch.isfinite(norm))
        if applied:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad()
        return norm.detach(), applied

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]
