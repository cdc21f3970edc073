"""Several low-rank adapters (LoRA) on one frozen network: student, critic and averages; without one it is the teacher.

Diffusers' own switches (`set_adapter`, `disable_adapters`) also flip `requires_grad`, after which a graph through several
adapters gives no gradients, without an error: here only the flags of the layers are switched.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError

#: Beginning of the names of the adapters, which are counted.
_NAME = "si_distill"


class Adapters:
    """
    The adapters of a network. `with adapters.use(name)` runs the network with one of them, None is none.

    α is the rank: loaders that do not read metadata take that for granted.

    Args:
        base: the network; changed in place, and frozen.
        rank: of each adapter, at least 1.
        targets: ends of the names of the linear layers that are changed.

    Raises:
        InputError: when no layer has one of these names, or the network has an adapter already.
    """

    def __init__(self, base: ModelMixin, rank: int, targets: tuple[str, ...]):
        self.base, self.rank, self.targets = base, rank, targets
        self.names: list[str] = []
        self.layers: dict[str, nn.Module] = {}  # the changed layers by their names
        self.current: str | None = None
        linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
        if present := list(getattr(base, "peft_config", {})):
            raise InputError(
                f"The {type(base).__name__} has an adapter already ({', '.join(present)}), which would not be a part of the "
                "teacher: make it one with pipeline.fuse_lora() and pipeline.unload_lora_weights()."
            )
        idle = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
        if idle or not all(targets):
            ends = sorted({_end(name) for name in linear})
            raise InputError(
                f"`lora_targets` {', '.join(map(repr, idle or targets))}: no linear layer of the {type(base).__name__} ends "
                f"so. Its layers end in {', '.join(ends)}."
            )

    def add(self, like: str | None = None) -> str:
        """A further adapter, in float32: of no effect, or equal to another. Gives its name."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        name, flags = f"{_NAME}_{len(self.names)}", {p: p.requires_grad for p in self.base.parameters()}
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=sorted(self.targets))
        # On the meta device random weights would be drawn for nothing.
        shapes_alone = next(self.base.parameters()).is_meta
        with warnings.catch_warnings(), torch.device("meta") if shapes_alone else nullcontext():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # it is why the names are counted
            self.base.add_adapter(config, name)
        self.names.append(name)
        self.layers = {path: layer for path, layer in self.base.named_modules() if isinstance(layer, BaseTunerLayer)}
        for layer in self.layers.values():
            for part in (layer.lora_A, layer.lora_B):
                part[name].float().requires_grad_(False)
                if like is not None:
                    part[name].load_state_dict(part[like].state_dict())
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        self._switch(self.current)
        return name

    def modules(self, name: str) -> nn.ModuleDict:
        """The two matrices of each layer of one adapter. Names have "/" for the ".", which a dictionary cannot have."""
        return nn.ModuleDict(
            {
                path.replace(".", "/"): nn.ModuleDict({"A": layer.lora_A[name], "B": layer.lora_B[name]})
                for path, layer in self.layers.items()
            }
        )

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """The network has this adapter inside, or none."""
        before = self.current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        self.current = name
        for layer in self.layers.values():
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def checkpoint_blocks(self) -> None:
        """Blocks keep their inputs alone for the backward pass, and are computed again with the adapter of their forward."""

        def run(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
            contexts = (lambda name: lambda: (nullcontext(), self.use(name)))(self.current)
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

        self.base.enable_gradient_checkpointing(run)


def _end(name: str) -> str:
    """The last part of a layer's name, with the one before if it is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
