"""UNet checkpoints of torchcfm's image examples (Tong et al. 2024) and of RealUID, which trains the same network.

It is the UNet of Dhariwal & Nichol 2021 ("Diffusion Models Beat GANs on Image Synthesis"), which diffusers has as
`UNet2DModel`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel

from ..errors import InputError
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .checkpoints import SEVERAL, STUDENTS, StateDict, check_tensors, choose_weights, find_tensor
from .config import ConvertConfig
from .converted import Converted

#: What the examples train with, which the tensors do not tell: heads of this width, attention at 16×16.
HEAD_DIM, ATTENTION_SIZE = 64, 16
NORM_GROUPS = 32

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass
class _Structure:
    """What the tensors of the UNet tell."""

    in_channels: int
    widths: list[int]
    layers: int
    attention: list[bool]
    num_classes: int
    scale_shift: bool
    resblock_updown: bool


def is_torchcfm(weights: StateDict) -> bool:
    return "input_blocks.0.0.weight" in weights and "middle_block.1.qkv.weight" in weights


def convert_torchcfm(content: dict[str, Any], settings: ConvertConfig) -> Converted:
    """
    A torchcfm or RealUID checkpoint as a teacher, or a RealUID generator as a one-step student.

    Their t = 1 is data and their velocity points to data, which the scheduler says (`reversed_time`, `prediction_sign`).
    RealUID's generator z + v(z, 0) is then x1 − v(x1, 1), the one-step map at `init_time` 1.

    Args:
        content: what `read_checkpoint` gave: torchcfm's `net_model` and `ema_model`, RealUID's `ema_models`, or its
            student's `gen` and `ema_gens`, or a bare state dictionary of a teacher.
        settings: `which`, `ema_decay`, `interpolant`, `sample_size`, `num_attention_heads`.

    Raises:
        InputError: when the tensors are not those of the network, or contradict the settings.
    """
    place, weights = choose_weights(content, settings.which, settings.ema_decay)
    interpolant = settings.interpolant or "linear"
    if interpolant == "vp":
        raise InputError("`interpolant` is vp, on which torchcfm trains no network: choose linear or trigonometric.")
    head = [name for name in weights if name.startswith("cls_pred_branch.")]
    weights = {name: tensor for name, tensor in weights.items() if name not in head}
    # Its attention projections are convolutions of one pixel's width.
    weights = {
        name: tensor.squeeze(-1) if name.endswith(("qkv.weight", "proj_out.weight")) and tensor.ndim == 3 else tensor
        for name, tensor in weights.items()
    }
    structure = _structure(weights)
    network = _build(structure, settings)
    layout = _layout(network)
    check_tensors(
        weights, layout, network, f"a UNet of widths {structure.widths} and {structure.layers} blocks a level"
    )

    state = {}
    for theirs, parts in layout.items():
        tensor = weights[theirs].float()
        if len(parts) == 3:  # rows are ordered by head, then query, key and value
            head_dim = network.config.attention_head_dim or len(tensor) // 3
            tensor = tensor.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
        for name, part in zip(parts, tensor.chunk(len(parts)), strict=True):
            state[name] = part.clone()
    network.load_state_dict(state, assign=True)
    name = place.split(" ")[0]
    return Converted(
        kind="RealUID" if name in (*SEVERAL, *STUDENTS) or head else "torchcfm",
        place=place,
        transformer=network,
        scheduler=StochasticInterpolantScheduler(interpolant=interpolant, reversed_time=True, prediction_sign=-1),
        student=name in STUDENTS,
        ignored=head,
    )


def _structure(weights: StateDict) -> _Structure:
    def shape(name: str, ndim: int) -> torch.Size:
        return find_tensor(weights, name, ndim, "torchcfm's UNet").shape

    blocks = {name.split(".")[1] for name in weights if name.startswith("input_blocks.")}
    resampling = {name.split(".")[1] for name in weights if name.startswith("input_blocks.") and ".0.op." in name}
    # A residual block that changes the resolution looks like any other; only on the way up it comes second in its block.
    second = {
        name.split(".")[1]
        for name in weights
        if name.startswith("output_blocks.") and name.split(".")[2] != "0" and name.endswith("in_layers.0.weight")
    }
    levels = 1 + (len(second) or len(resampling))
    if not blocks or len(blocks) % levels or len(blocks) == levels:
        raise InputError(
            f"The checkpoint was taken for torchcfm's UNet, but it has {len(blocks)} input_blocks, which do not divide into "
            f"{levels} levels (it changes the resolution {levels - 1} times)."
        )
    layers = len(blocks) // levels - 1
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = [shape(f"input_blocks.{n}.0.in_layers.2.weight", 4)[0] for n in first]
    if any(width % NORM_GROUPS for width in widths):
        raise InputError(f"The checkpoint's levels have the widths {widths}; its UNet has multiples of {NORM_GROUPS}.")
    return _Structure(
        in_channels=shape("input_blocks.0.0.weight", 4)[1],
        widths=widths,
        layers=layers,
        attention=[f"input_blocks.{n}.1.qkv.weight" in weights for n in first],
        num_classes=shape("label_emb.weight", 2)[0] if "label_emb.weight" in weights else 0,
        scale_shift=shape("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        resblock_updown=bool(second),
    )


def _build(structure: _Structure, settings: ConvertConfig) -> UNet2DModel:
    """The network, on the meta device."""
    head_dim = _head_dim(structure, settings.num_attention_heads)
    size = settings.sample_size
    if size is None:
        if structure.attention.count(True) != 1:
            raise InputError(
                f"Attention is at the levels {[n for n, used in enumerate(structure.attention) if used]}, not at one alone, "
                "so that the image's size does not follow from it: give --sample_size."
            )
        size = ATTENTION_SIZE * 2 ** structure.attention.index(True)
    levels = len(structure.widths)
    if size % 2 ** (levels - 1):
        raise InputError(
            f"`sample_size` {size} cannot be halved {levels - 1} times, between the {levels} levels of the checkpoint."
        )
    resampling, down, up = "conv", "DownBlock2D", "UpBlock2D"
    if structure.resblock_updown:
        resampling, down, up = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=size,
            in_channels=structure.in_channels,
            out_channels=structure.in_channels,
            block_out_channels=structure.widths,
            layers_per_block=structure.layers,
            down_block_types=["AttnDownBlock2D" if used else down for used in structure.attention],
            up_block_types=["AttnUpBlock2D" if used else up for used in reversed(structure.attention)],
            downsample_type=resampling,
            upsample_type=resampling,
            resnet_time_scale_shift="scale_shift" if structure.scale_shift else "default",
            attention_head_dim=head_dim,
            attn_norm_num_groups=NORM_GROUPS,
            norm_num_groups=NORM_GROUPS,
            num_class_embeds=structure.num_classes or None,
        )


def _head_dim(structure: _Structure, heads: int | None) -> int | None:
    """Width of an attention head; None for a single head of each layer's own width."""
    widths = {width for width, used in zip(structure.widths, structure.attention, strict=True) if used}
    widths.add(structure.widths[-1])
    if heads == 1:
        return None
    if heads is None and any(width % HEAD_DIM for width in widths):
        raise InputError(
            f"The layers with attention have the widths {sorted(widths)}, which heads of width {HEAD_DIM} do not divide, "
            "and the tensors do not say how many heads they have: give --num_attention_heads."
        )
    if heads is not None and (len(widths) > 1 or max(widths) % heads):
        raise InputError(
            f"`num_attention_heads` is {heads}, but the layers with attention have the widths {sorted(widths)}: they need "
            "one width that is a multiple of it."
        )
    return HEAD_DIM if heads is None else max(widths) // heads


def _layout(network: UNet2DModel) -> dict[str, tuple[str, ...]]:
    """torchcfm's name of each tensor → ours; the fused projection is three of ours.

    Its blocks are numbered through, ours are grouped by level.
    """
    config, modules = network.config, dict(_OUTER)

    def residual(theirs: str, ours: str) -> None:
        modules.update({f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in _RESIDUAL.items()})

    def attention(theirs: str, ours: str) -> None:
        modules.update({f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in _ATTENTION.items()})
        modules[f"{theirs}.qkv"] = ours

    def resampler(theirs: str, ours: str, convolution: str) -> None:
        if config.downsample_type == "resnet":
            residual(theirs, ours)
        else:
            modules[f"{theirs}.{convolution}"] = f"{ours}.conv"

    levels, layers, number = len(config.block_out_channels), config.layers_per_block, 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for layer in range(layers):
            residual(f"input_blocks.{number}.0", f"{block}.resnets.{layer}")
            attention(f"input_blocks.{number}.1", f"{block}.attentions.{layer}")
            number += 1
        resampler(f"input_blocks.{number}.0", f"{block}.downsamplers.0", "op")
        number += 1
    for index in (0, 1):
        residual(f"middle_block.{2 * index}", f"mid_block.resnets.{index}")
    attention("middle_block.1", "mid_block.attentions.0")
    for step in range(levels):
        block, last = f"up_blocks.{step}", (step + 1) * (layers + 1) - 1
        for layer in range(layers + 1):
            number = step * (layers + 1) + layer
            residual(f"output_blocks.{number}.0", f"{block}.resnets.{layer}")
            attention(f"output_blocks.{number}.1", f"{block}.attentions.{layer}")
        place = 2 if config.up_block_types[step] == "AttnUpBlock2D" else 1
        resampler(f"output_blocks.{last}.{place}", f"{block}.upsamplers.0", "conv")

    ours, layout = network.state_dict(), {}
    for theirs, module in modules.items():
        parts = [f"{module}.to_{part}" for part in "qkv"] if theirs.endswith("qkv") else [module]
        for kind in ("weight", "bias"):
            names = tuple(f"{part}.{kind}" for part in parts)
            if names[0] in ours:  # a level may lack attention, a block its shortcut
                layout[f"{theirs}.{kind}"] = names
    if config.num_class_embeds:
        layout["label_emb.weight"] = ("class_embedding.weight",)
    return layout
