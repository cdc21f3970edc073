"""Networks that are cut over all ranks (FSDP2): what is cut, how gradients are clipped, how networks are put together again.

Each rank holds a part of every parameter. A forward gathers one unit (a block) at a time and lets it go again, so every call
of a sharded network is collective. Weights stay in float32; with bfloat16 a unit is gathered in bfloat16 and its gradients
are summed in float32. Inputs are not cast: times stay in float32.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...log_variance import LogVariance
from ...models.unet_edm2 import MPConv, normalize
from ...pipelines.interpolant_pipeline_network import VIEWS
from ...text_to_image.network import TextNetwork, adapter_parameters
from .blocks import block_classes


def shard(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Cuts a network over all ranks, block by block, in place; it is not trained yet, and on the CPU the same everywhere.

    Parameters without dimensions (EDM2's gains) cannot be cut, and adapters are not: every rank has them (see
    `average_replicated`).
    """
    # Nothing here changes an output of a network in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    plugin = accelerator.state.fsdp_plugin
    exact = MixedPrecisionPolicy()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    replicated = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    replicated |= adapter_parameters(network)
    for parameter in replicated:
        parameter.data = parameter.data.to(accelerator.device)
    common = dict(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)), ignored_params=replicated
    )
    policy = half if accelerator.mixed_precision == "bf16" else exact
    names = {*block_classes(network), *(name for view in VIEWS.values() for name in view.shared_modules)}
    for module in reversed(list(network.modules())):  # what is inside comes first
        kind = type(module).__name__
        if isinstance(module, LogVariance):  # the size of a loss is not for bfloat16
            fully_shard(module, mp_policy=exact, **common)
        elif kind in names:
            fully_shard(module, mp_policy=policy, reshard_after_forward=plugin.reshard_after_forward, **common)
    fully_shard(network, mp_policy=policy, **common)
    if any(isinstance(module, MPConv) for module in network.modules()):
        network.register_forward_pre_hook(_normalize_shards, prepend=True)
    return network


def place_frozen(accelerator: Accelerator, network: nn.Module, shared: bool) -> None:
    """Puts a frozen network on the device, or with FSDP2 cuts it over all ranks.

    Args:
        accelerator: of the run.
        network: a teacher, on the CPU.
        shared: whether what is trained are adapters on it, which stay whole.
    """
    if accelerator.is_fsdp2:
        shard(accelerator, network.base if shared else network)
    else:
        network.to(accelerator.device)


@torch.no_grad()
def _normalize_shards(network: nn.Module, args: tuple) -> None:
    """EDM2's forced weight normalisation of the weights themselves: in a forward it reaches only the gathered copies.

    A weight is cut between its output channels, each of which is normalised on its own.
    """
    if network.training:
        reshard(network)
        for module in network.modules():
            if isinstance(module, MPConv) and module.forced:
                rows = module.weight.to_local()
                rows.copy_(normalize(rows, tuple(range(1, rows.ndim))))


def reshard(network: nn.Module) -> None:
    """Lets go of what a forward without gradients has left gathered, so that the parameters are the shards again."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_class(network: nn.Module) -> type[nn.Module]:
    """The class of a network as it was before sharding."""
    kind = type(network)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def whole_network(accelerator: Accelerator, network: nn.Module) -> nn.Module | None:
    """On rank 0 a network of the original class with all weights, on the CPU if it was sharded; else None. Collective."""
    if isinstance(network, TextNetwork) and network.shares_base:
        # To save an adapter cuts its base again, on rank 0 alone: then the ranks' next forwards would not match.
        reshard(network.base)
        return network if accelerator.is_main_process else None
    if isinstance(network, TextNetwork):
        whole = whole_network(accelerator, network.base)
        return None if whole is None else network.around(whole)
    if not isinstance(network, FSDPModule):
        return network if accelerator.is_main_process else None
    weights = accelerator.get_state_dict(network)
    if not accelerator.is_main_process:
        return None
    # Without the key by which diffusers would put back what a folder had left to its defaults, and the network has not.
    config = {name: value for name, value in network.config.items() if name != "_use_default_values"}
    with init_empty_weights(include_buffers=False):
        whole = plain_class(network).from_config(config)
    whole.load_state_dict(weights, assign=True)
    return whole.requires_grad_(False).eval()


def _kinds(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Sharded and replicated parameters apart: torch's operations on lists take no mixture."""
    parameters = list(parameters)
    for sharded in (True, False):
        found = [parameter for parameter in parameters if isinstance(parameter, DTensor) == sharded]
        if found:
            yield found


def optimizer_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for an optimizer, none of which mixes sharded and replicated parameters."""
    return [{"params": group} for group in _kinds(parameters)]


def average_replicated(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of parameters that every rank has whole, in one exchange; collective."""
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    if gradients:
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        shares = mean.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [share.view_as(g) for share, g in zip(shares, gradients, strict=True)])


def own_parts(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank holds of each tensor, sharing its memory.

    Operations on lists of these are those on lists of the whole, if they are elementwise, without the search for a way to
    distribute them that lists of sharded tensors cost.
    """
    with torch.no_grad():
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def clip_grad_norm(accelerator: Accelerator, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips gradients to a global norm as `torch.nn.utils.clip_grad_norm_` does, sharded and replicated ones together.

    Gradients within the norm are left alone, where torch multiplies them by 1.

    Returns:
        The norm before, (), the same number on every rank.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = own_parts(p.grad for p in parameters)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        norm = _norm_over_ranks(accelerator, parameters)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    if (factor := max_norm / (norm + 1e-6)) < 1:
        torch._foreach_mul_(gradients, factor)
    return norm


def _norm_over_ranks(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    squares = torch.zeros((), device=accelerator.device)
    for group in _kinds(parameters):
        norm = torch.nn.utils.get_total_norm(own_parts(p.grad for p in group))
        sharded = isinstance(group[0], DTensor)
        squares += accelerator.reduce(norm.square(), "sum") if sharded else norm.square()
    return squares.sqrt()
