"""SiT checkpoints (Ma et al. 2024) and those of REPA (Yu et al. 2025), which trains the same network."""

import math
import re
from typing import Any

import torch

from ..errors import InputError
from ..interpolants import get_interpolant
from ..models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .checkpoints import StateDict, check_tensors, choose_weights, find_tensor
from .config import ConvertConfig
from .converted import Converted
from .pickles import PickledObject
from .shown import shown

#: Our names of what the training scripts call `path_type` and `prediction`.
PATHS = {"Linear": "linear", "GVP": "trigonometric", "VP": "vp", "linear": "linear", "cosine": "trigonometric"}
#: What they were told that matters here.
TOLD = ("path_type", "prediction", "num_classes", "proj_coeff")
#: Where scripts keep what they were told.
ARGUMENTS = ("args", "hyper_parameters", "config", "cfg", "hparams")
PREDICTIONS = {"velocity": "velocity", "score": "score", "noise": "epsilon", "v": "velocity"}

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.0",
    "mlp.fc2": "ff.2",
    "adaLN_modulation.1": "modulation",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def is_sit(weights: StateDict) -> bool:
    return "x_embedder.proj.weight" in weights and "t_embedder.mlp.0.weight" in weights


def convert_sit(content: dict[str, Any], settings: ConvertConfig) -> Converted:
    """
    A SiT or REPA checkpoint as a teacher.

    SiT's t = 1 is data and its velocity points to data, which its scheduler says (`reversed_time`, `prediction_sign`).
    REPA's t = 0 is data and its velocity points to noise, as here.

    Args:
        content: what `read_checkpoint` gave: `ema`, `model`, `opt` and `args`, or a bare state dictionary.
        settings: `kind`, `which`, `preset`, `interpolant`, `prediction_type`, `num_classes`, `sample_size`,
            `num_attention_heads`.

    Raises:
        InputError: when the tensors are not those of the network, or contradict the settings.
    """
    place, weights = choose_weights(content, settings.which, None)
    saved = _saved_arguments(content)
    weights, projectors = _without_projectors(_renumbered(weights))
    positions = weights.pop("pos_embed", None)
    network = _build(weights, positions, settings, saved)
    repa = _is_repa(settings.kind, bool(projectors), network.config.learn_sigma, saved)
    _set_positions(network, positions)
    interpolant = _choice("interpolant", settings.interpolant, PATHS, saved.get("path_type"), "linear")
    prediction_type = _choice(
        "prediction_type", settings.prediction_type, PREDICTIONS, saved.get("prediction"), "velocity"
    )

    network.load_state_dict(_our_names(weights, network), assign=True)
    return Converted(
        kind="REPA" if repa else "SiT",
        place=place,
        preset=_preset_of(network),
        transformer=network,
        scheduler=StochasticInterpolantScheduler(
            interpolant=interpolant,
            prediction_type=prediction_type,
            init_time=get_interpolant(interpolant).start_time(prediction_type),
            reversed_time=not repa,
            prediction_sign=1 if repa or prediction_type != "velocity" else -1,
        ),
        ignored=projectors,
    )


def _saved_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The settings that the training script saved: its parsed arguments, or a dictionary of them."""
    found: dict[str, Any] = {}

    def collect(value: Any, depth: int) -> None:
        value = value.state if isinstance(value, PickledObject) else value
        if not isinstance(value, dict) or depth > 6:  # groups in groups, as configs of YAML are
            return
        for name, item in value.items():
            first = found.setdefault(name, item) if name in TOLD else item
            if first is not item and shown(first) != shown(item):
                raise InputError(
                    f"The checkpoint says of its `{name}` both {shown(first)} and {shown(item)}: leave one out."
                )
            collect(item, depth + 1)

    for name in ARGUMENTS:
        arguments = content.get(name)
        if not isinstance(arguments, (dict, PickledObject, type(None))):
            raise InputError(
                f"The arguments saved in the checkpoint are a {type(arguments).__name__}, from which the path and the "
                "prediction cannot be read. Save them as a dictionary, or leave them out and give --interpolant and "
                "--prediction_type."
            )
    collect(content, 0)
    return found


def _renumbered(weights: StateDict) -> StateDict:
    """REPA's first checkpoints count the blocks after the projectors anew, as `decoder_blocks`."""
    encoder = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    renamed = {}
    for name, tensor in weights.items():
        block = re.match(r"decoder_blocks\.(\d+)\.", name)
        if block:
            name = f"blocks.{int(block[1]) + len(encoder)}.{name[block.end() :]}"
        renamed[name] = tensor
    return renamed


def _without_projectors(weights: StateDict) -> tuple[StateDict, list[str]]:
    projectors = [name for name in weights if name.startswith("projectors.")]
    return {name: tensor for name, tensor in weights.items() if name not in projectors}, projectors


def _is_repa(kind: str, projectors: bool, learn_sigma: bool, saved: dict[str, Any]) -> bool:
    """REPA says so by its projectors or settings; SiT's own code always learns sigma and saves its settings."""
    found = projectors or "proj_coeff" in saved
    if kind == "sit" and found:
        raise InputError(
            "`kind` is sit, but the checkpoint has REPA's projectors or settings. The two run time in opposite directions: "
            "use --kind repa, or leave it out."
        )
    if kind == "auto" and not (found or learn_sigma or "path_type" in saved):
        raise InputError(
            "The checkpoint may be SiT's or REPA's, which run time in opposite directions: its tensors are the same without "
            "learned sigma, and it has neither projectors nor settings. Say which with --kind sit or --kind repa."
        )
    return kind == "repa" or found


def _build(
    weights: StateDict, positions: torch.Tensor | None, settings: ConvertConfig, saved: dict[str, Any]
) -> SiTTransformer2DModel:
    """The network that the tensors describe, on the meta device, with all their names and shapes checked."""
    patches = find_tensor(weights, "x_embedder.proj.weight", 4, "a SiT")
    table = find_tensor(weights, "y_embedder.embedding_table.weight", 2, "a SiT")
    output = find_tensor(weights, "final_layer.linear.weight", 2, "a SiT")
    dim, channels, patch = patches.shape[:3]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    num_classes = settings.num_classes or saved.get("num_classes") or table.shape[0] - 1
    if not isinstance(num_classes, int):
        raise InputError(f"The checkpoint says that it has {shown(num_classes)} classes: give --num_classes.")
    if table.shape[0] - num_classes not in (0, 1):
        raise InputError(
            f"y_embedder.embedding_table.weight is {tuple(table.shape)}: it has {table.shape[0]} rows, which are not "
            f"{num_classes} classes with or without a null class."
        )
    if settings.preset is not None:
        heads = _heads_of_preset(settings.preset, depth, patches)
    else:
        heads = settings.num_attention_heads or _heads_of_shape(depth, dim)
    if dim % heads:
        raise InputError(f"`num_attention_heads` {heads} does not divide the width {dim} of x_embedder.proj.weight.")
    config = dict(
        sample_size=_sample_size(positions, patch, settings.sample_size),
        patch_size=patch,
        in_channels=channels,
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        mlp_ratio=find_tensor(weights, "blocks.0.mlp.fc1.weight", 2, "a SiT").shape[0] / dim,
        num_classes=num_classes,
        class_dropout_prob=0.1 if table.shape[0] > num_classes else 0.0,
        learn_sigma=output.shape[0] == 2 * channels * patch**2,
    )
    try:
        with torch.device("meta"):
            network = SiTTransformer2DModel(**config)
    except ValueError as error:
        raise InputError(f"The checkpoint's network cannot be built: {error}") from error
    check_tensors(weights, _layout(network), network, f"a SiT of {depth} blocks, width {dim} and patches of {patch}")
    return network


def _heads_of_preset(preset: str, depth: int, patches: torch.Tensor) -> int:
    if preset not in SIT_PRESETS:
        raise InputError(f"Unknown `preset` {preset!r}. Choose one of: {', '.join(SIT_PRESETS)}.")
    layers, heads, head_dim, patch = SIT_PRESETS[preset]
    dim, _, found_patch, _ = patches.shape
    if (layers, heads * head_dim, patch) != (depth, dim, found_patch):
        raise InputError(
            f"`preset` is {preset}, with {layers} blocks, width {heads * head_dim} and patches of {patch}, but the "
            f"checkpoint has {depth} blocks and x_embedder.proj.weight is {tuple(patches.shape)}: width {dim} and patches "
            f"of {found_patch}."
        )
    return heads


def _heads_of_shape(depth: int, dim: int) -> int:
    for layers, heads, head_dim, _ in SIT_PRESETS.values():
        if (layers, heads * head_dim) == (depth, dim):
            return heads
    raise InputError(
        f"{depth} blocks of width {dim} are no published size, and the tensors do not say how many attention heads they "
        "have: give --num_attention_heads."
    )


def _preset_of(network: SiTTransformer2DModel) -> str | None:
    config = network.config
    shape = (config.num_layers, config.num_attention_heads, config.attention_head_dim, config.patch_size)
    return next((name for name, preset in SIT_PRESETS.items() if preset == shape), None)


def _sample_size(positions: torch.Tensor | None, patch: int, wanted: int | None) -> int:
    if positions is None or positions.ndim != 3:
        if wanted is None:
            raise InputError(
                "The checkpoint has no pos_embed (1, tokens, width) to tell the image's size: give --sample_size."
            )
        return wanted
    tokens = positions.shape[1]
    size = math.isqrt(tokens) * patch
    patches = f"pos_embed is {tuple(positions.shape)}: {tokens} patches of {patch}×{patch}"
    if size**2 != tokens * patch**2:
        raise InputError(f"{patches} make no square image.")
    if wanted not in (None, size):
        raise InputError(f"{patches} make an image of {size}×{size}, not one of `sample_size` {wanted}.")
    return size


def _set_positions(network: SiTTransformer2DModel, stored: torch.Tensor | None) -> None:
    """Gives the network its fixed sines, which no file of ours stores; others in the checkpoint make another network."""
    config, built_for = network.config, network.pos_embed
    size, patch, dim = config.sample_size, config.patch_size, built_for.proj.out_channels
    computed = type(built_for)(size, size, patch, config.in_channels, dim).pos_embed
    if stored is not None and stored.shape != computed.shape:
        raise InputError(f"pos_embed is {tuple(stored.shape)} instead of {tuple(computed.shape)}.")
    distance = 0.0 if stored is None else float((stored.float() - computed).abs().max())
    # Averages that were saved in half precision have the sines rounded.
    rounding = torch.finfo(stored.dtype).eps if stored is not None and stored.is_floating_point() else 0.0
    if not distance < max(1e-4, rounding):
        raise InputError(
            f"pos_embed {tuple(stored.shape)} is not the fixed sine-cosine embedding of SiT: it differs by up to "
            f"{distance:.3g}. Its positions were learned or resized, which this network does not have."
        )
    built_for.pos_embed = computed


def _layout(network: SiTTransformer2DModel) -> dict[str, tuple[str, ...]]:
    """SiT's name of each tensor → ours; the fused projection is three of ours."""
    pairs = {theirs: (ours,) for theirs, ours in _OUTER.items()}
    for n in range(network.config.num_layers):
        pairs |= {f"blocks.{n}.{theirs}": (f"transformer_blocks.{n}.{ours}",) for theirs, ours in _BLOCK.items()}
        pairs[f"blocks.{n}.attn.qkv"] = tuple(f"transformer_blocks.{n}.{ours}" for ours in _QKV)
    layout = {
        f"{theirs}.{kind}": tuple(f"{part}.{kind}" for part in ours)
        for theirs, ours in pairs.items()
        for kind in ("weight", "bias")
    }
    return {**layout, "y_embedder.embedding_table.weight": ("class_embed.weight",)}


def _our_names(weights: StateDict, network: SiTTransformer2DModel) -> StateDict:
    state = {}
    for theirs, ours in _layout(network).items():
        for name, part in zip(ours, weights[theirs].float().chunk(len(ours)), strict=True):
            state[name] = part.clone()
    return state


def _choice(name: str, given: str | None, names: dict[str, str], saved: Any, default: str) -> str:
    """The user's choice, or the checkpoint's, which must not contradict each other."""
    known = names.get(saved) if isinstance(saved, str) else None
    if saved is not None and given is None and known is None:
        raise InputError(
            f"The checkpoint was trained with {shown(saved)}, which is not known here: say what it is with --{name}."
        )
    if given is not None and known is not None and given != known:
        raise InputError(
            f"`{name}` is {given}, but the checkpoint was trained with {saved}, which is {known}. Leave it out."
        )
    return given or known or default
