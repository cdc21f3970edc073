"""Folders that version 0.1 saved, with the code that they carry: they load and give the same images."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from si_distill import OneStepInterpolantPipeline

FOLDER = Path(__file__).with_name("saved_by_0_1")

# Prints what it generated; the package is blocked, so the code is what the folder carries.
ALONE = """
import sys

sys.modules["si_distill"] = None

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

name, folder, tensors, out = sys.argv[1:]
given = load_file(tensors)
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
inputs = {"class_labels": [0, 2]} if name == "student" else {"image": given["reference"]}
save_file({name: pipe(**inputs, latents=given["latents"], output_type="latent").images}, out)
"""


@pytest.fixture
def expected():
    return load_file(FOLDER / "images.safetensors")


@pytest.mark.parametrize("loader", [OneStepInterpolantPipeline, DiffusionPipeline], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", ["student", "bridge"])
def test_this_version_loads_it(name, loader, expected, tmp_path, remote_code_cache):
    kwargs = {"trust_remote_code": True} if loader is DiffusionPipeline else {}
    pipe = loader.from_pretrained(FOLDER / name, **kwargs)
    inputs = {"class_labels": [0, 2]} if name == "student" else {"image": expected["reference"]}
    images = pipe(**inputs, latents=expected["latents"], output_type="latent").images
    torch.testing.assert_close(images, expected[name], rtol=1e-5, atol=1e-6)
    pipe.save_pretrained(tmp_path / name)  # with today's code
    again = OneStepInterpolantPipeline.from_pretrained(tmp_path / name)
    assert torch.equal(again(**inputs, latents=expected["latents"], output_type="latent").images, images)


@pytest.mark.parametrize("name", ["student", "bridge"])
def test_it_runs_on_the_code_that_it_carries(name, expected, tmp_path):
    folder, out = tmp_path / name, tmp_path / "images.safetensors"
    shutil.copytree(FOLDER / name, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ALONE, name, str(folder), str(FOLDER / "images.safetensors"), str(out)]
    subprocess.run(command, check=True, env=environment)
    torch.testing.assert_close(load_file(out)[name], expected[name], rtol=1e-5, atol=1e-6)
