"""What all tests share: nothing reaches a network or a GPU, and accelerate's process-wide state starts afresh."""

import os

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from accelerate.state import AcceleratorState, GradientState

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A saved teacher of 10 classes on 8×8 pixels, as small as they come."""
    from helpers import tiny_sit

    folder = tmp_path_factory.mktemp("teacher")
    names = {n: str(n) for n in range(10)}
    InterpolantPipeline(tiny_sit(num_classes=10), StochasticInterpolantScheduler(), id2label=names).save_pretrained(
        folder
    )
    return folder
