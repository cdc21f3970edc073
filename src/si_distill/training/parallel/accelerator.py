"""The accelerator of a run, as its settings and its launcher want it."""

import os
import warnings
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, DynamoBackend, gather_object
from torch.distributed.fsdp import OffloadPolicy, StateDictType

from ...errors import InputError
from ...launching import check_processes
from ..config import TrainingConfig
from ..optimizers import check_8bit_adam
from .blocks import check_compiler


def build_accelerator(settings: TrainingConfig) -> Accelerator:
    """The accelerator.

    Raises:
        InputError: when the settings and the launcher do not go together.
    """
    # torch 2.15 has another name for it, which Accelerate 1.15 does not know yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_dir=settings.output_dir,
            # Buffers never differ between ranks, and gradients need no copy next to the buckets that are reduced.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise InputError(f"Accelerate refuses the settings: {error}") from error
    check_processes(accelerator.num_processes)
    _check_launcher(accelerator, settings)
    _check_tracker(accelerator, settings.report_to)
    check_8bit_adam(settings, accelerator.is_fsdp2)
    check_compiler(settings, accelerator.device)
    return accelerator


def agree(accelerator: Accelerator, action: Callable[[], None], errors: tuple[type[Exception], ...]) -> str:
    """Does `action` on this rank, and says on every rank why one of them failed; empty where none did. Collective.

    A rank that failed alone would leave the others waiting.
    """
    error = ""
    try:
        action()
    except errors as failure:
        error = str(failure) if isinstance(failure, InputError) else f"{type(failure).__name__}: {failure}"
    return next((text for text in gather_object([error]) if text), "")


def check_installed(name: str) -> None:
    """Refuses a tracker that Accelerate would leave out with a warning."""
    if name not in ("none", *map(str, get_available_trackers())):
        raise InputError(f"`report_to` is {name!r}, which is not installed: pip install {name}, or choose none.")


def _check_tracker(accelerator: Accelerator, name: str) -> None:
    """Refuses a tracker that is not there, or has no key."""
    check_installed(name)

    def log_in() -> None:
        import wandb

        wandb.login()  # of no effect offline

    problem = name == "wandb" and agree(
        accelerator, log_in if accelerator.is_main_process else lambda: None, (Exception,)
    )
    if problem:
        raise InputError(
            f"`report_to` is wandb, which cannot be used ({problem}): log in by `wandb login`, or set the environment "
            "variable WANDB_MODE=offline."
        )


def _check_launcher(accelerator: Accelerator, settings: TrainingConfig) -> None:
    """Refuses what a launcher's configuration asks for and three coupled networks cannot be trained with."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", settings.mixed_precision):
        raise InputError(
            f"The launcher asks for mixed_precision={precision}, the run for {settings.mixed_precision}. The run decides: "
            "leave it at no in the launcher, and give the script --mixed_precision bf16 or no (fp16 and fp8 are not "
            "supported: losses through three networks leave their range)."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"The launcher asks for {accelerator.gradient_accumulation_steps} gradient accumulation steps: leave it at 1 "
            "there, and give the script --gradient_accumulation_steps, which counts for each network on its own."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError(
            "The launcher asks for a dynamo backend, which would rename every weight: leave it at no there, and give the "
            "script --compile."
        )
    kind = accelerator.distributed_type
    if kind != DistributedType.FSDP and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            f"The launcher asks for FSDP, but on {accelerator.num_processes} process(es) on {accelerator.device.type} "
            "Accelerate does not shard: it would silently train unsharded networks. Launch several processes on GPUs, "
            "or take configs/accelerate/ddp.yaml or cpu.yaml."
        )
    if kind != DistributedType.NO and kind != DistributedType.FSDP and not kind.startswith("MULTI_"):
        raise InputError(
            f"Training under {kind} is not supported: it takes one network with one optimizer, and distillation couples "
            "three. Take configs/accelerate/ddp.yaml or fsdp2.yaml."
        )
    if accelerator.parallelism_config is not None:
        raise InputError(
            "The launcher has a parallelism_config: tensor, context and hybrid parallelism are not supported; take "
            "configs/accelerate/fsdp2.yaml as it is."
        )
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator)


def _check_fsdp(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    asked = {
        f"fsdp_version: {plugin.fsdp_version}": (
            plugin.fsdp_version != 2,
            "version 1 has no networks that share a loss; set 2",
        ),
        "fsdp_cpu_ram_efficient_loading: true": (
            plugin.cpu_ram_efficient_loading,
            "FSDP2 takes each rank's own weights, which all ranks read from the same file or draw from the same seed",
        ),
        "fsdp_activation_checkpointing: true": (
            plugin.activation_checkpointing,
            "set it to false and give the script --gradient_checkpointing",
        ),
        "fsdp_offload_params: true": (
            plugin.fsdp_version == 2 and type(plugin.cpu_offload) is not OffloadPolicy,
            "parameters stay on the GPUs; set it to false",
        ),
        f"fsdp_state_dict_type: {plugin.state_dict_type}": (
            plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT,
            "a checkpoint is written by all ranks, each its own shards, and can be read by any number of them; set "
            "SHARDED_STATE_DICT (the pipeline is always written whole)",
        ),
    }
    for setting, (wrong, reason) in asked.items():
        if wrong:
            raise InputError(f"The launcher's `{setting}` cannot be used: {reason}. See configs/accelerate/fsdp2.yaml.")
