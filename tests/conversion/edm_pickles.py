"""Writes pickles in the structure of EDM's `torch_utils.persistence`: objects that carry their class's source code.

An object of a persistent class is pickled as a call of `torch_utils.persistence._reconstruct_persistent_obj` with a
dictionary: `type`, `version`, `module_src` (the source to execute), `class_name`, and `state`, the object's attributes.
"""

import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from si_distill.models import EDM2UNet2DModel, EDMUNet2DModel

#: What the published code would execute on loading.
MODULE_SOURCE = "raise SystemExit('the source code in the pickle was executed')"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name is used")


class EasyDict(dict):
    pass


@contextmanager
def published_modules() -> Iterator[None]:
    """The modules by whose names the objects are pickled, importable for as long as they are written."""
    modules = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    for module, value in (
        (modules["torch_utils.persistence"], _reconstruct_persistent_obj),
        (modules["dnnlib.util"], EasyDict),
    ):
        value.__module__ = module.__name__
        setattr(module, value.__name__, value)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent(torch.nn.Module):
    """An object of a persistent class."""

    def __init__(self, class_name: str, init_kwargs: Mapping[str, Any] | None = None, **attributes: Any):
        super().__init__()
        self._class_name = class_name
        self._init_args, self._init_kwargs = (), EasyDict(init_kwargs or {})
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self):
        state = EasyDict({name: value for name, value in self.__dict__.items() if name != "_class_name"})
        meta = dict(type="class", version=6, module_src=MODULE_SOURCE, class_name=self._class_name, state=state)
        return _reconstruct_persistent_obj, (meta,)


def module_tree(root: Persistent, tensors: Mapping[str, torch.Tensor]) -> Persistent:
    """`root` with a tree of modules below it that holds the tensors by these names."""
    for name, value in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.ModuleDict() if part in ("enc", "dec") else Persistent("Layer"))
            module = module._modules[part]
        if leaf in ("freqs", "phases", "resample_filter"):
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
    return root


def edm_network(network: EDMUNet2DModel, **changes: Any) -> Persistent:
    """EDM's `SongUNet` or `DhariwalUNet` with the weights of ours."""
    config = network.config
    arguments = dict(
        img_resolution=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        label_dim=config.num_classes,
        augment_dim=config.augment_dim,
        model_channels=config.model_channels,
        channel_mult=list(config.channel_mult),
        channel_mult_emb=config.channel_mult_emb,
        num_blocks=config.num_blocks,
        attn_resolutions=list(config.attn_resolutions),
        dropout=config.dropout,
        label_dropout=config.class_dropout_prob,
    )
    tensors = dict(network.state_dict())
    if config.architecture != "adm":
        first = config.architecture == "ddpmpp"
        arguments |= dict(
            embedding_type="positional" if first else "fourier",
            encoder_type="standard" if first else "residual",
            decoder_type="standard",
            channel_mult_noise=1 if first else 2,
            resample_filter=[1, 1] if first else [1, 3, 3, 1],
        )
        size = f"{config.sample_size}x{config.sample_size}"
        names = {"out_norm": f"dec.{size}_aux_norm", "out_conv": f"dec.{size}_aux_conv"}
        tensors = {
            ".".join([names.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): value
            for name, value in tensors.items()
        }
    class_name = "DhariwalUNet" if config.architecture == "adm" else "SongUNet"
    return module_tree(Persistent(class_name, arguments | changes), tensors)


def edm_preconditioning(network: EDMUNet2DModel, class_name: str = "EDMPrecond", **changes: Any) -> Persistent:
    return Persistent(
        class_name,
        sigma_min=0,
        sigma_max=float("inf"),
        sigma_data=0.5,
        use_fp16=False,
        model=edm_network(network, **changes),
    )


def edm2_preconditioning(network: EDM2UNet2DModel, class_name: str = "Precond", **changes: Any) -> Persistent:
    config = network.config
    arguments = dict(
        img_resolution=config.sample_size,
        img_channels=config.in_channels,
        label_dim=config.num_classes,
        model_channels=config.model_channels,
        channel_mult=list(config.channel_mult),
        num_blocks=config.num_blocks,
        attn_resolutions=list(config.attn_resolutions),
        channels_per_head=config.attention_head_dim,
        dropout=config.dropout,
    )
    root = Persistent(
        class_name, sigma_data=0.5, unet=module_tree(Persistent("UNet", arguments | changes), network.state_dict())
    )
    if class_name == "Precond":
        logvar = {
            "logvar_fourier.freqs": torch.arange(4.0),
            "logvar_fourier.phases": torch.ones(4),
            "logvar_linear.weight": torch.full((1, 4), 2.0),
        }
        module_tree(root, logvar)
    return root


def write(path: Path, content: Any) -> Path:
    with published_modules(), path.open("wb") as file:
        pickle.dump(content, file)
    return path
