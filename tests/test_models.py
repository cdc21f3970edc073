"""The finished models of the repository: small, without code, and whole for whoever saves and loads them elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.errors import InputError
from si_distill.loading import load_pipeline

MODELS = Path(__file__).parent.parent / "models"
KINDS = {"teacher": InterpolantPipeline, "student": OneStepInterpolantPipeline}
FOLDERS = [(MODELS / f"fashion-mnist-{role}", role) for role in KINDS]


def test_they_are_small_and_hold_no_code():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}


@pytest.mark.parametrize(("folder", "role"), FOLDERS)
def test_saved_elsewhere_they_load_without_the_package(folder, role, tmp_path, remote_code_cache):
    pipeline = KINDS[role].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "copy")
    stranger = DiffusionPipeline.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    stranger.set_progress_bar_config(disable=True)
    steps = {} if role == "student" else {"num_inference_steps": 2}
    made = [
        each(["Sneaker", "Bag"], generator=torch.Generator().manual_seed(0), output_type="pt", **steps).images
        for each in (pipeline, stranger)
    ]
    assert torch.equal(*made)
    assert made[0].shape == (2, 1, 28, 28)
    assert made[0].std() > 0.2  # pictures, not noise around grey


@pytest.mark.parametrize(("folder", "role"), FOLDERS)
@pytest.mark.parametrize("file", ["model_index.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_damaged_file_is_named(folder, role, file, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as caught:
        load_pipeline(KINDS[role], role, str(copy))
    assert Path(file).name in str(caught.value)
