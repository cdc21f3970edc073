"""SiT as its paper and DiT's describe it, in plain functions on a state dictionary with SiT's names."""

import math

import torch
import torch.nn.functional as F

DIM, HEADS, DEPTH = 24, 3, 2


def sines(positions: torch.Tensor, width: int, cosine_first: bool) -> torch.Tensor:
    """(N, width) from (N,): frequencies 10000^(−i / (width/2))."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    phase = positions.double()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()] if cosine_first else [phase.sin(), phase.cos()], dim=1)


def positions(grid: int, dim: int) -> torch.Tensor:
    """(1, grid², dim): half of the channels for the column, half for the row."""
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    parts = [sines(axis.flatten(), dim // 2, cosine_first=False) for axis in (column, row)]
    return torch.cat(parts, dim=1)[None].float()


def sit_weights(
    size: int = 8,
    patch: int = 2,
    channels: int = 4,
    rows: int = 6,
    learn_sigma: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A random checkpoint; no tensor is zero, as adaLN's would be at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj": (DIM, channels, patch, patch),
        "t_embedder.mlp.0": (DIM, 256),
        "t_embedder.mlp.2": (DIM, DIM),
        "final_layer.linear": (patch**2 * channels * (1 + learn_sigma), DIM),
        "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    }
    for n in range(DEPTH):
        shapes |= {
            f"blocks.{n}.attn.qkv": (3 * DIM, DIM),
            f"blocks.{n}.attn.proj": (DIM, DIM),
            f"blocks.{n}.mlp.fc1": (4 * DIM, DIM),
            f"blocks.{n}.mlp.fc2": (DIM, 4 * DIM),
            f"blocks.{n}.adaLN_modulation.1": (6 * DIM, DIM),
        }
    weights = {"pos_embed": positions(size // patch, DIM)}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    weights["y_embedder.embedding_table.weight"] = torch.randn(rows, DIM, generator=generator)
    return weights


def sit_output(
    weights: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """SiT's forward at its own time t, in float64: (B, C, H, W)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name, value):
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def modulated(value, shift, scale):
        mean, variance = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, unbiased=False)
        return (value - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift

    kernel = weights["x_embedder.proj.weight"]
    channels, patch, grid = kernel.shape[1], kernel.shape[2], x.shape[-1] // kernel.shape[2]
    tokens = F.conv2d(x.double(), kernel, weights["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"]
    embedded = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sines(t, 256, cosine_first=True))))
    condition = F.silu(embedded + weights["y_embedder.embedding_table.weight"][labels])[:, None]

    for n in range(DEPTH):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{n}.adaLN_modulation.1", condition).split(
            DIM, -1
        )
        fused = linear(f"blocks.{n}.attn.qkv", modulated(tokens, shift1, scale1))
        query, key, value = fused.view(*fused.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1) @ value
        tokens = tokens + gate1 * linear(f"blocks.{n}.attn.proj", attention.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{n}.mlp.fc1", modulated(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2 * linear(f"blocks.{n}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", condition).split(DIM, -1)
    patches = linear("final_layer.linear", modulated(tokens, shift, scale))
    image = (
        patches.view(len(x), grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[-2:])
    )
    return image[:, :channels]
