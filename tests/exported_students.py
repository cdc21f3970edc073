"""Small exported text-to-image students for tests."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny_pipelines import build

from si_distill.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from si_distill.text_to_image.student import TextToImageStudent
from si_distill.text_to_image.teacher import TextToImageTeacher


def text_settings(name: str) -> SimpleNamespace:
    """How the texts of a tiny pipeline are encoded."""
    return SimpleNamespace(
        max_length=None if name in ("sd15", "sdxl") else 64, told_guidance=3.5 if name == "flux" else None
    )


def disturbed(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The network with other weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def student_scheduler(teacher: TextToImageTeacher, **student: object) -> StochasticInterpolantScheduler:
    return StochasticInterpolantScheduler.from_config(
        teacher.scheduler.config, **{"solver": "ddim", "student_steps": [1, 4], **student}
    )


def save_student(
    root: Path, name: str, folder: str, lora_rank: int | None = 4, seed: int = 1, **student: object
) -> Path:
    """Saves the pipeline `name` to root/name, and a student of it to root/folder, whose path is returned."""
    pipeline = build(name)
    pipeline.save_pretrained(root / name)
    teacher = TextToImageTeacher(pipeline, (32, 32), lora_rank=lora_rank)
    network = disturbed(copy.deepcopy(teacher.transformer), seed)
    scheduler = student_scheduler(teacher, **student)
    TextToImageStudent(teacher, network, scheduler, str(root / name), text_settings(name)).save_pretrained(
        root / folder
    )
    return root / folder
