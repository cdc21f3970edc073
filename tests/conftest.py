"""What all tests share: nothing reaches a network or a GPU, and accelerate's process-wide state starts afresh."""

import os
import shutil
import sys
import tempfile

os.environ["SI_DISTILL_CACHE"] = tempfile.mkdtemp(prefix="si_distill-cache-")
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler

# The same examples in every run: a change fails because of what it changes. `--hypothesis-profile default` draws afresh.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_sessionfinish():
    shutil.rmtree(os.environ["SI_DISTILL_CACHE"], ignore_errors=True)


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


@pytest.fixture
def remote_code_cache(tmp_path, monkeypatch):
    """An empty cache for the code that saved folders carry: files of earlier tests cannot stand in for missing ones."""
    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    return cache
