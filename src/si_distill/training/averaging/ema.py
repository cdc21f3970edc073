"""Exponential moving averages of a network's weights: decay rules, one average, and all averages of a run."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ...errors import TrainingStopped
from ...text_to_image.network import has_text, shares_base
from ..config import TrainingConfig
from ..parallel.sharding import own_parts, reshard, shard, whole_network
from ..run.checkpoints import WRITE_ERRORS
from .posthoc import EMA_SNAPSHOTS, Snapshots, power_exponent, write_weights

#: Folder of the further averages in a run.
EMA_WEIGHTS = "ema"

#: The decay d at update number n, counted from 0.
DecayRule = Callable[[int], float]


def warmed_up(decay: float) -> DecayRule:
    """min(decay, (1 + n) / (10 + n)), as in Diffusers' `EMAModel`: forgets the initial weights in the first updates."""
    return lambda updates: min(decay, (1 + updates) / (10 + updates))


def half_life(images: float, rampup_ratio: float | None, images_per_update: int) -> DecayRule:
    """0.5^(B/h): after h images the average has moved half way to weights that stand still.

    h = min(images, rampup_ratio · images seen so far), as in EDM (Karras et al. 2022) and SiD (Zhou et al. 2024).

    Args:
        images: the half-life.
        rampup_ratio: share of the images seen that bounds it; None for no bound.
        images_per_update: the global batch B.
    """

    def decay(updates: int) -> float:
        bound = images if rampup_ratio is None else min(images, rampup_ratio * updates * images_per_update)
        return 0.5 ** (images_per_update / bound) if bound > 0 else 0.0

    return decay


def power_function(exponent: float) -> DecayRule:
    """(1 − 1/t)^(γ+1) with t = n + 1: the rule whose average weighs update k by (k^(γ+1) − (k−1)^(γ+1)) / t^(γ+1).

    That is the integral of the profile (γ+1) τ^γ / t^(γ+1) over (k − 1, k] (Karras et al. 2024, EDM2, section 3): the
    average is that of the piecewise constant weights exactly. The first update forgets the initial weights.
    """
    return lambda updates: (1 - 1 / (updates + 1)) ** (exponent + 1)


class EMA:
    """A frozen copy of a network that follows it: θ̄ ← d θ̄ + (1 − d) θ.

    Buffers are copied, not averaged. Diffusers' `EMAModel` is not used: its list of shadow tensors does not survive
    sharding.

    Args:
        network: the copy to keep the average in; made frozen and put in evaluation mode.
        decay: a rule, or a constant that is warmed up (see `warmed_up`).
    """

    def __init__(self, network: nn.Module, decay: float | DecayRule):
        self.network = network.requires_grad_(False).eval()
        self.decay_at = decay if callable(decay) else warmed_up(decay)

    @classmethod
    def of(cls, network: nn.Module, decay: float | DecayRule) -> "EMA":
        """An average that starts at the network's present weights."""
        return cls(copy.deepcopy(network), decay)

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Moves the average towards `network` after its update number `updates`, counted from 0."""
        for sharded in (self.network, network):
            reshard(sharded)
        average, new = own_parts(self.network.parameters()), own_parts(network.parameters())
        torch._foreach_lerp_(average, new, 1 - self.decay_at(updates))
        for target, source in zip(self.network.buffers(), network.buffers(), strict=True):
            target.copy_(source)


class Averages:
    """All averages of one network in a run: the pipeline's, further ones, and the power averages of `ema_power_sigmas`.

    The further ones lie in `ema/NAME.safetensors` as of the last stored step, the power averages of every stored step in
    `ema_snapshots/`. Each average is one more network in memory and in the checkpoints.

    Args:
        network: not yet wrapped for training; copied.
        settings: of the run.
        images_per_update: the global batch of one update of this network.
    """

    def __init__(self, network: nn.Module, settings: TrainingConfig, images_per_update: int):
        def constant_or_half_life(value: float) -> float | DecayRule:
            if value >= 1:
                return half_life(value, settings.ema_rampup_ratio, images_per_update)
            return value if settings.ema_warmup else lambda updates: value

        self.settings = settings
        main = settings.ema_decay if settings.ema_halflife_images is None else settings.ema_halflife_images
        self.main = EMA.of(network, constant_or_half_life(main))
        self.further = {_name(value): EMA.of(network, constant_or_half_life(value)) for value in settings.ema_extra}
        self.power = {s: EMA.of(network, power_function(power_exponent(s))) for s in settings.ema_power_sigmas}
        self.snapshots = Snapshots(Path(settings.output_dir) / EMA_SNAPSHOTS)
        self._stored_before = False

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves the averages to the device and makes them part of the checkpoints; after the trained networks."""
        self.accelerator = accelerator
        for ema in self._all():
            if accelerator.is_fsdp2 and shares_base(ema.network):
                accelerator._models.append(ema.network.to(accelerator.device))
            elif accelerator.is_fsdp2:
                # Stock pipelines call the stock network itself.
                shard(accelerator, ema.network.base if has_text(ema.network) else ema.network)
                accelerator._models.append(ema.network)
            else:
                ema.network = accelerator.prepare_model(ema.network, evaluation_mode=True)

    @property
    def network(self) -> nn.Module:
        """The average that the pipeline gets, without wrappers."""
        return self.accelerator.unwrap_model(self.main.network, keep_fp32_wrapper=False)

    def whole_network(self) -> nn.Module | None:
        """The same with all of its weights in one place, to be saved: on rank 0, elsewhere nothing. Collective."""
        return whole_network(self.accelerator, self.network)

    def update(self, network: nn.Module, updates: int) -> None:
        """After the network's update number `updates`, counted from 0, also one that was thrown away.

        Weights that stand still for an update are part of the trajectory: without them a power average would not have its
        profile. Only updates before the first may be left out: the averages are the initial weights until then anyway.
        """
        for ema in self._all():
            ema.update(network, updates)

    def store(self, step: int) -> None:
        """Writes snapshots and further averages if they are due after iteration `step`, counted from 1; collective.

        To be called after each iteration and before its checkpoint: a kill between the two leaves a snapshot that the
        resumed run deletes here and writes again; the other way round it would be missing for good.

        Raises:
            TrainingStopped: when a file cannot be written.
        """
        settings, writes = self.settings, self.accelerator.is_main_process
        every = settings.save_steps if settings.ema_snapshot_steps is None else settings.ema_snapshot_steps
        try:
            if not self._stored_before and writes:
                self.snapshots.forget_after(step - 1)
            self._stored_before = True
            if step % every and step != settings.max_steps:
                return
            for sigma_rel, ema in self.power.items():
                weights, buffers = self._weights(ema)
                if writes:
                    self.snapshots.write(weights, buffers, sigma_rel, step)
            for name, ema in self.further.items():
                weights, _ = self._weights(ema)
                if writes:
                    path = Path(settings.output_dir) / EMA_WEIGHTS / f"{name}.safetensors"
                    write_weights(path, weights, {"step": str(step)})
        except WRITE_ERRORS as error:
            raise TrainingStopped(
                f"Could not write the averages of step {step} to {settings.output_dir}: {error}. Whole checkpoints stay; "
                "make room and resume with --resume_from_checkpoint latest."
            ) from error

    def _weights(self, ema: EMA) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The state dict, whole on rank 0 also of a sharded network, and which of its names are buffers."""
        weights = self.accelerator.get_state_dict(ema.network)
        return weights, weights.keys() - {
            name for name, _ in self.accelerator.unwrap_model(ema.network).named_parameters()
        }

    def _all(self) -> list[EMA]:
        return [self.main, *self.further.values(), *self.power.values()]


def _name(value: float) -> str:
    return f"{'decay' if value < 1 else 'halflife'}_{value!r}".removesuffix(".0")
