"""What a run notes in facts.json beyond its settings: data, networks, hardware, versions. They appear in the model card."""

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ... import __version__
from ...data import TrainingData
from ...data.config import DataConfig
from ...data.latents.format import images_of
from ...fingerprints import hub_commit
from ..parallel.sharding import plain_class

CONSOLE_COMMAND = "si-distill"
#: The folder of its commands.
COMMANDS = Path(__file__).parents[2] / "commands"


def describe_session(accelerator: Accelerator) -> dict[str, Any]:
    """One start of the training script; a resumed run has several."""
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        hardware = f"{count} × {torch.cuda.get_device_name()}"
    else:
        cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in each process"
        hardware = f"{count} × {accelerator.device.type} ({platform.machine()}, {cores})"
    return {
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": [*_as_typed(sys.argv[0]), *sys.argv[1:]],
        "processes": count,
        "hardware": hardware,
        "versions": {
            "si_distill": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def describe_data(config: DataConfig, data: TrainingData | None) -> dict[str, Any] | None:
    """The images that the training reads, or None when it reads none."""
    if data is None:
        return None
    config = images_of(config)
    return {
        # On the Hub, as far as one can tell: `user/name` that is no folder here and no format with files.
        "source": "hub" if "/" in config.name and not config.data_files and not Path(config.name).exists() else "local",
        "name": data.name,
        "split": config.split,
        "images": data.count,
        "classes" if config.caption_column is None else "captions": len(data.class_names),
        "size": config.image_size,
        **({"references": config.describe_references()} if config.has_references else {}),
    }


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Class and size of a network."""
    return {"class": plain_class(network).__name__, "parameters": sum(p.numel() for p in network.parameters())}


def describe_teacher(name: str, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Where a teacher came from, with its commit on the Hub, and what it is."""
    return {
        "name": name,
        "source": "local" if Path(name).exists() else "hub",
        "revision": hub_commit(pipeline.transformer.config),
        "network": describe_network(pipeline.transformer),
        "scheduler": {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")},
    }


def _as_typed(script: str) -> list[str]:
    """What was started, as it was most likely typed: a script below the working folder, `si-distill`, or a module of it."""
    path = Path(script)
    if path.name == CONSOLE_COMMAND or path == COMMANDS / "__main__.py":
        return [CONSOLE_COMMAND]
    if path.parent == COMMANDS:
        return ["-m", f"si_distill.commands.{path.stem}"]
    return [str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else script]
