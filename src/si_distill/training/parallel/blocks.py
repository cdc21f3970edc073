"""The repeated blocks of a network: what is compiled, checkpointed and sharded one by one."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ...errors import InputError
from ...text_to_image.network import TextNetwork, shares_base
from ..config import TrainingConfig

#: Graphs of one block's code that may be kept. Teacher, critic and student share that code, each with and without gradients
#: to its weights, for one and for two halves of a batch: more than the 8 after which torch falls back to running it eagerly.
COMPILED_GRAPHS = 64
#: Inductor's, for CPUs: tanh (of GELU) by one exponential. Three times as fast as the vector library's; its error, a unit of
#: float32's rounding of 1, is lost in GELU's 1 + tanh.
COMPILER_OPTIONS = {"cpp.use_decompose_tanh": True}


def block_classes(network: nn.Module) -> set[str]:
    """Names of the classes of a network's repeated blocks, as diffusers' models declare them; empty where there are none."""
    names: set[str] = set()
    for module in network.modules():
        names.update(getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ())
        # A class that declares none, such as diffusers' DiT: what its list of blocks holds.
        names.update(type(block).__name__ for block in getattr(module, "transformer_blocks", ()))
    return names


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in the network's order."""
    names = block_classes(network)
    return [module for module in network.modules() if type(module).__name__ in names]


def has_dropout(network: nn.Module) -> bool:
    """Whether a network in training mode drops anything."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def checkpoint_blocks(network: nn.Module) -> None:
    """Keeps of each block only its input for the backward pass, in place.

    Raises:
        InputError: for a network whose class cannot.
    """
    if isinstance(network, TextNetwork) and network.adapters is not None:
        return network.adapters.checkpoint_blocks()
    for module in network.modules():
        if isinstance(module, ModelMixin):
            try:
                module.enable_gradient_checkpointing()
            except ValueError as error:
                raise InputError(f"`gradient_checkpointing` cannot be used: {error}") from error


def compile_blocks(network: nn.Module) -> None:
    """Compiles each block in place, before the network is wrapped; names of weights stay as they are.

    Raises:
        InputError: for a network without repeated blocks.
    """
    found = blocks(network)
    if not found:
        raise InputError(
            f"`compile` cannot be used: a {type(network).__name__} has no repeated blocks. Set it to false."
        )
    torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
    for block in found:
        block.compile(options=COMPILER_OPTIONS)


def check_compiler(settings: TrainingConfig, device: torch.device) -> None:
    """Compiles a trivial function, to fail early if there is no compiler.

    Raises:
        InputError: when it fails.
    """
    if not settings.compile:
        return
    try:
        torch.compile(torch.exp)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"`compile` is set, but torch cannot compile for {device.type} here: {reason}. On CPUs it needs a C++ compiler "
            "(g++), on GPUs Triton and a C compiler. Install them, or set compile to false."
        ) from error


def half_precision_weights(network: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the layers in the repeated blocks that autocast runs in bfloat16.

    Outside the blocks networks look at their weights' dtype, e.g. to round an embedding of the time.
    """
    layers = {
        module for block in blocks(network) for module in block.modules() if type(module) in (nn.Linear, nn.Conv2d)
    }
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def keep_in_bfloat16(network: nn.Module) -> None:
    """Rounds these weights of a frozen network in place: every forward under autocast would do so, in other memory."""
    for parameter in half_precision_weights(network):
        parameter.data = parameter.data.to(torch.bfloat16)


def prepare_blocks(network: nn.Module, settings: TrainingConfig, differentiated: bool = True) -> None:
    """What the settings want of a network's blocks.

    Args:
        network: not yet on the device. What adapters sit on is prepared once, as the teacher's.
        settings: of the run.
        differentiated: whether gradients flow through it.

    Raises:
        InputError: for a network whose class cannot.
    """
    if shares_base(network):
        return
    if settings.gradient_checkpointing and differentiated:
        checkpoint_blocks(network)
    if settings.compile:
        compile_blocks(network)
