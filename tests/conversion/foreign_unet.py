"""ADM's UNet (Dhariwal & Nichol 2021) in plain functions on a state dictionary with the names of torchcfm's checkpoints."""

import math

import torch
import torch.nn.functional as F
from foreign_sit import sines

WIDTHS, LAYERS, HEADS = (32, 64), 1, 4


def unet_weights(
    classes: int = 0, scale_shift: bool = False, resblock_updown: bool = False, attention_level: int = 1, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A random checkpoint on 3 channels; no tensor is zero."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    embedding = 4 * WIDTHS[0]

    def layer(name, *shape):
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)

    def norm(name, channels):
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(channels, generator=generator)
        weights[f"{name}.bias"] = 0.3 * torch.randn(channels, generator=generator)

    def residual(name, before, after):
        norm(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", (1 + scale_shift) * after, embedding)
        norm(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name, channels):
        norm(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1)
        layer(f"{name}.proj_out", channels, channels, 1)

    def resampler(name, channels, convolution):
        if resblock_updown:
            residual(name, channels, channels)
        else:
            layer(f"{name}.{convolution}", channels, channels, 3, 3)

    layer("time_embed.0", embedding, WIDTHS[0])
    layer("time_embed.2", embedding, embedding)
    if classes:
        weights["label_emb.weight"] = torch.randn(classes, embedding, generator=generator)
    layer("input_blocks.0.0", WIDTHS[0], 3, 3, 3)
    skips, width, number = [WIDTHS[0]], WIDTHS[0], 1
    for level, channels in enumerate(WIDTHS):
        for _ in range(LAYERS):
            residual(f"input_blocks.{number}.0", width, channels)
            if level == attention_level:
                attention(f"input_blocks.{number}.1", channels)
            width, number = channels, number + 1
            skips.append(width)
        if level < len(WIDTHS) - 1:
            resampler(f"input_blocks.{number}.0", width, "op")
            number += 1
            skips.append(width)
    residual("middle_block.0", width, width)
    attention("middle_block.1", width)
    residual("middle_block.2", width, width)
    number = 0
    for level in reversed(range(len(WIDTHS))):
        for index in range(LAYERS + 1):
            residual(f"output_blocks.{number}.0", width + skips.pop(), WIDTHS[level])
            width = WIDTHS[level]
            if level == attention_level:
                attention(f"output_blocks.{number}.1", width)
            if level and index == LAYERS:
                resampler(f"output_blocks.{number}.{1 + (level == attention_level)}", width, "conv")
            number += 1
    norm("out.0", width)
    layer("out.2", 3, width, 3, 3)
    return weights


def unet_output(weights, x, t, labels=None, scale_shift=False, heads=HEADS):
    """torchcfm's forward at its own time t, in float64: (B, 3, H, W)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def has(name):
        return f"{name}.weight" in weights

    def parameters(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def convolve(name, value, stride=1):
        return F.conv2d(value, *parameters(name), stride=stride, padding=parameters(name)[0].shape[-1] // 2)

    def normalise(name, value):
        groups = value.unflatten(1, (32, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
        weight, bias = (p[:, None, None] for p in parameters(name))
        return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2) * weight + bias

    def residual(name, value, resample=lambda value: value):
        hidden = resample(F.silu(normalise(f"{name}.in_layers.0", value)))
        hidden, value = convolve(f"{name}.in_layers.2", hidden), resample(value)
        shift = F.linear(F.silu(embedded), *parameters(f"{name}.emb_layers.1"))[..., None, None]
        if scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = normalise(f"{name}.out_layers.0", hidden) * (1 + scale) + shift
        else:
            hidden = normalise(f"{name}.out_layers.0", hidden + shift)
        hidden = convolve(f"{name}.out_layers.3", F.silu(hidden))
        return hidden + (convolve(f"{name}.skip_connection", value) if has(f"{name}.skip_connection") else value)

    def attention(name, value):
        tokens = normalise(f"{name}.norm", value).flatten(2)
        weight, bias = parameters(f"{name}.qkv")
        fused = (weight[..., 0] @ tokens + bias[:, None]).view(len(value), heads, 3, -1, tokens.shape[-1])
        query, key, mixed = fused.unbind(2)
        scores = torch.einsum("bhct,bhcs->bhts", query, key) / query.shape[2] ** 0.5
        mixed = torch.einsum("bhts,bhcs->bhct", scores.softmax(-1), mixed).flatten(1, 2)
        weight, bias = parameters(f"{name}.proj_out")
        return value + (weight[..., 0] @ mixed + bias[:, None]).view(value.shape)

    def double(value):
        return value.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def halve(value):
        return value.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

    embedded = F.linear(sines(t, WIDTHS[0], cosine_first=True), *parameters("time_embed.0"))
    embedded = F.linear(F.silu(embedded), *parameters("time_embed.2"))
    if "label_emb.weight" in weights:
        embedded = embedded + weights["label_emb.weight"][labels]

    hidden = convolve("input_blocks.0.0", x.double())
    skips, down = [hidden], 1 + LAYERS
    for number in range(1, len(WIDTHS) * (LAYERS + 1)):
        name = f"input_blocks.{number}"
        if number % (LAYERS + 1) == 0:
            hidden = (
                convolve(f"{name}.0.op", hidden, 2) if has(f"{name}.0.op") else residual(f"{name}.0", hidden, halve)
            )
        else:
            hidden = residual(f"{name}.0", hidden)
            hidden = attention(f"{name}.1", hidden) if has(f"{name}.1.qkv") else hidden
        skips.append(hidden)
    hidden = residual("middle_block.2", attention("middle_block.1", residual("middle_block.0", hidden)))
    for number in range(len(WIDTHS) * down):
        name = f"output_blocks.{number}"
        hidden = residual(f"{name}.0", torch.cat([hidden, skips.pop()], dim=1))
        hidden = attention(f"{name}.1", hidden) if has(f"{name}.1.qkv") else hidden
        for place in (1, 2):
            if has(f"{name}.{place}.conv"):
                hidden = convolve(f"{name}.{place}.conv", double(hidden))
            elif has(f"{name}.{place}.in_layers.0"):
                hidden = residual(f"{name}.{place}", hidden, double)
    return convolve("out.2", F.silu(normalise("out.0", hidden)))
