"""What autograd keeps of a forward, measured on the meta device."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..parallel.blocks import blocks


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


def graph_sizes(
    network: nn.Module, forward: Callable[[int], object], checkpoint: Callable[[], object] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a forward keeps, and what its largest block keeps when that is run again: each what does not depend on the batch
    (normalised weights), and what a sample adds.

    Args:
        network: whose blocks they are.
        forward: of a batch of this size.
        checkpoint: makes the blocks keep their inputs alone; None leaves them.
    """

    def size(batch: int) -> int:
        return graph_bytes(network, functools.partial(forward, batch))

    again = (0, 0)
    if checkpoint is not None:
        again = _line(*(_largest_block(network, functools.partial(size, batch)) for batch in (1, 2)))
        checkpoint()
    return _line(size(1), size(2)), again


def _line(one: int, two: int) -> tuple[int, int]:
    """Constant and slope of sizes at batches of 1 and 2."""
    return 2 * one - two, two - one


def _largest_block(network: nn.Module, forward: Callable[[], int]) -> int:
    """Bytes that the network's largest block keeps in `forward`."""
    sizes: list[int] = []

    def measure(block: nn.Module, args: tuple, kwargs: dict) -> None:
        handles[block].remove()  # not in the call below
        sizes.append(graph_bytes(network, lambda: block(*args, **kwargs)))

    handles = {block: block.register_forward_pre_hook(measure, with_kwargs=True) for block in blocks(network)}
    forward()
    return max(sizes, default=0)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
