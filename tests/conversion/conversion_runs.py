"""Conversions of checkpoints that a test writes."""

from pathlib import Path

import torch

from si_distill.conversion.config import ConvertConfig
from si_distill.conversion.convert import convert_checkpoint
from si_distill.settings import parse_settings

#: Times with both ends.
TIMES = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])


def convert(folder: Path, content, *options) -> Path:
    """Writes `content` as a checkpoint in `folder` and converts it with the options of the script."""
    source, out = folder / "checkpoint.pt", folder / "converted"
    torch.save(content, source)
    convert_source(source, out, *options)
    return out


def convert_source(source: Path, out: Path, *options) -> None:
    """Converts what is at `source` with the options of the script."""
    argv = ["--source", source, "--out", out, *options]
    convert_checkpoint(parse_settings(ConvertConfig, list(map(str, argv))))


def distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((output - expected).abs().max() / expected.abs().max())
