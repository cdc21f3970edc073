"""What says whether two results are of the same weights, images or settings: short hashes, and commits on the Hub."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import torch

#: Hexadecimal digits kept of a SHA-256: enough to tell apart what one person compares.
LENGTH = 16


def of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()[:LENGTH]


def of_module(module: torch.nn.Module) -> str | None:
    """Hash of a module's state dict; None of a module without any weights."""
    state = module.state_dict()
    return of_tensors(sorted(state.items())) if state else None


def of_values(values: Any) -> str:
    """Hash of plain values: what JSON can hold."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def hub_commit(config: Any) -> str | None:
    """The commit that a model was loaded at from the Hub, as the path in its config says; None of other models."""
    found = re.search(r"snapshots/([0-9a-f]{40})", str(getattr(config, "_name_or_path", "")))
    return found[1] if found else None
