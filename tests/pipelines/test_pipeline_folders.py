"""Saved folders: three ways to load one, saving again, and clear errors for broken ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from helpers import tiny_sit
from safetensors.torch import load_file, save_file

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

CLASSES = {"student": OneStepInterpolantPipeline, "teacher": InterpolantPipeline}
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")

# Loads both folders before it saves either: their `pipeline.py` then overwrite each other in the cache of code.
WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "si_distill":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
try:
    import si_distill
except ImportError as error:
    assert str(error) == "blocked", error
else:
    raise AssertionError("the package can be imported")

import torch
from diffusers import DiffusionPipeline

root = sys.argv[1]
pipes = {
    name: DiffusionPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True) for name in ("teacher", "student")
}
for name, pipe in pipes.items():
    kwargs = {"num_inference_steps": 3, "guidance_scale": 2.0, "solver": "heun"} if name == "teacher" else {}
    generator = torch.Generator().manual_seed(0)
    images = pipe(["one", 2], generator=generator, output_type="pt", **kwargs).images
    torch.save(images, f"{root}/{name}.pt")
    pipe.save_pretrained(f"{root}/{name}-again")
    again = type(pipe).from_pretrained(f"{root}/{name}-again", trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(again(["one", 2], generator=generator, output_type="pt", **kwargs).images, images)
assert not any(name.split(".")[0] == "si_distill" for name in sys.modules)
"""


def tiny_vae():
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    return AutoencoderKL(**blocks, block_out_channels=(4,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5)


def make(name):
    scheduler = StochasticInterpolantScheduler(interpolant="vp", interpolant_kwargs={"b1": 15.0}, init_time=0.6)
    return CLASSES[name](tiny_sit(in_channels=4), scheduler, tiny_vae().eval(), {1: "one, uno"})


def images(pipe):
    kwargs = {}
    if type(pipe).__name__ == "InterpolantPipeline":
        kwargs = dict(num_inference_steps=3, guidance_scale=2.0, solver="heun")
    return pipe(["one", 2], generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with `student`, `teacher`, and what a process without the package made of them."""
    root = tmp_path_factory.mktemp("folders")
    for name in CLASSES:
        make(name).save_pretrained(root / name)
    home = str(root / "home")
    environment = {**os.environ, "HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def student(root, tmp_path):
    """A copy of the student's folder, to be broken."""
    return Path(shutil.copytree(root / "student", tmp_path / "student"))


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_loads_without_trust(root, name):
    pipe = CLASSES[name].from_pretrained(root / name)
    assert type(pipe) is CLASSES[name]
    assert type(pipe.transformer).__module__ == "si_distill.models.transformer_sit"
    assert pipe.config.id2label == {1: "one, uno"}
    assert torch.equal(images(pipe), images(make(name)))


@pytest.mark.parametrize("name", CLASSES)
def test_diffusers_loads_with_trust(root, name, tmp_path, monkeypatch):
    # A cache of its own, also where an earlier test has loaded helpers of the same names from another.
    for module in [module for module in sys.modules if module.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    sys.path.insert(0, str(tmp_path))
    pipe = DiffusionPipeline.from_pretrained(root / name, trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules")
    assert torch.equal(images(pipe), images(make(name)))


@pytest.mark.parametrize("name", CLASSES)
def test_a_process_without_the_package_makes_the_same_images(root, name):
    expected = images(make(name))
    assert torch.equal(torch.load(root / f"{name}.pt"), expected)
    assert torch.equal(images(CLASSES[name].from_pretrained(root / f"{name}-again")), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_saved_again_has_the_same_files(root, name, tmp_path):
    CLASSES[name].from_pretrained(root / name).save_pretrained(tmp_path)

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    original = files(root / name)
    assert files(tmp_path) == original
    assert files(root / f"{name}-again") == original
    assert sorted(file for file in original if file.endswith(".py")) == [
        "interpolant_condition.py",
        "interpolant_field.py",
        "interpolant_latents.py",
        "interpolant_pipeline_base.py",
        "interpolant_pipeline_folder.py",
        "interpolant_pipeline_images.py",
        "interpolant_pipeline_labels.py",
        "interpolant_pipeline_network.py",
        *(["interpolant_probability_flow.py"] if name == "teacher" else []),
        "pipeline.py",
        "scheduler/interpolant_base.py",
        "scheduler/interpolant_bridge.py",
        "scheduler/interpolant_forward.py",
        "scheduler/interpolant_names.py",
        "scheduler/interpolant_paths.py",
        "scheduler/interpolant_solvers.py",
        "scheduler/interpolant_steps.py",
        "scheduler/scheduling_stochastic_interpolant.py",
        "transformer/transformer_sit.py",
    ]
    for name_of_file, content in original.items():
        assert str(root).encode() not in content, f"{name_of_file} holds a path of this machine"


def test_the_index_names_the_folder_s_own_code(root):
    index = json.loads((root / "student" / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": ["pipeline", "OneStepInterpolantPipeline"],
        "guidance": None,
        "image_upsampling": None,
        "id2label": {"1": "one, uno"},
        "scheduler": ["scheduling_stochastic_interpolant", "StochasticInterpolantScheduler"],
        "transformer": ["transformer_sit", "SiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vae_pixel_min": -1.0,
    }


def test_a_pipeline_saves_over_the_folder_it_was_loaded_from(student):
    OneStepInterpolantPipeline.from_pretrained(student).save_pretrained(student)
    assert torch.equal(images(OneStepInterpolantPipeline.from_pretrained(student)), images(make("student")))


def test_components_can_be_replaced_while_loading(root):
    transformer = tiny_sit(seed=7, in_channels=4)
    pipe = OneStepInterpolantPipeline.from_pretrained(root / "student", transformer=transformer, vae=None)
    assert pipe.transformer is transformer
    assert pipe.vae is None


def test_a_bfloat16_variant_is_close_to_float32(student):
    OneStepInterpolantPipeline.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(student, variant="bf16")
    assert (student / "transformer" / "diffusion_pytorch_model.bf16.safetensors").is_file()
    assert (student / WEIGHTS).is_file()
    pipe = OneStepInterpolantPipeline.from_pretrained(student, variant="bf16", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    exact = images(OneStepInterpolantPipeline.from_pretrained(student))
    # 8 bits through a network and a decoder on the same noise; images of other noise differ by more than 0.3.
    assert 1e-5 < (images(pipe).float() - exact).abs().max() < 0.1


def test_a_pycache_left_in_a_folder_does_not_survive_saving(student):
    (student / "transformer" / "__pycache__").mkdir()
    pipe = OneStepInterpolantPipeline.from_pretrained(student)
    pipe.save_pretrained(student, variant="fp32")
    OneStepInterpolantPipeline.from_pretrained(student, variant="fp32")
    (student / "transformer" / "__pycache__").mkdir()
    with pytest.raises(ValueError, match="remove __pycache__"):
        OneStepInterpolantPipeline.from_pretrained(student, variant="fp32")


@pytest.mark.parametrize(("cls", "name"), [(OneStepInterpolantPipeline, "teacher"), (InterpolantPipeline, "student")])
def test_students_and_teachers_are_not_mistaken_for_each_other(root, cls, name):
    right = CLASSES[name].__name__
    with pytest.raises(ValueError, match=rf"{root / name}.*saved as {right}.*{right}\.from_pretrained"):
        cls.from_pretrained(root / name)


def test_another_library_s_pipeline_is_refused_by_name(student):
    edit(student / "model_index.json", _class_name="DiTPipeline")
    with pytest.raises(ValueError, match="saved as DiTPipeline"):
        OneStepInterpolantPipeline.from_pretrained(student)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, folder / WEIGHTS)


def cut_short(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


BROKEN = {
    "not a pipeline": (lambda f: (f / "model_index.json").unlink(), OSError, "no model_index.json"),
    "index cut short": (lambda f: (f / "model_index.json").write_text("{"), OSError, "not a valid JSON"),
    "index of nothing": (lambda f: (f / "model_index.json").write_text("{}"), ValueError, "no pipeline class"),
    "no component": (lambda f: shutil.rmtree(f / "transformer"), OSError, "no folder transformer/"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), OSError, "no file named diffusion_pytorch_model.*copy"),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), OSError, "no file named config.json"),
    "weights cut short": (cut_short, OSError, "Unable to load weights.*cut short, copy"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), OSError, "Unable to load weights.*cut short, copy"),
    "missing tensor": (drop_a_tensor, ValueError, r"1 tensors are missing.*proj_out.weight"),
    "smaller config": (
        lambda f: edit(f / "transformer" / "config.json", num_layers=1),
        ValueError,
        r"tensors in its weights have no place.*transformer_blocks\.1",
    ),
    "larger config": (
        lambda f: edit(f / "transformer" / "config.json", num_layers=3),
        ValueError,
        r"tensors are missing.*transformer_blocks\.2",
    ),
    "other width": (
        lambda f: edit(f / "transformer" / "config.json", attention_head_dim=16),
        ValueError,
        "expected shape",
    ),
    "impossible config": (
        lambda f: edit(f / "transformer" / "config.json", patch_size=5),
        ValueError,
        "`patch_size` 5 does not divide",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_says_what_is_wrong_with_it(student, case):
    damage, error, message = BROKEN[case]
    damage(student)
    with pytest.raises(error, match=f"(?s){message}") as raised:
        OneStepInterpolantPipeline.from_pretrained(student)
    assert str(student) in str(raised.value)


def test_missing_tensors_are_noticed_when_they_would_be_random(student):
    drop_a_tensor(student)
    with pytest.raises(ValueError, match="1 tensors are missing"):
        OneStepInterpolantPipeline.from_pretrained(student, low_cpu_mem_usage=False)


@pytest.mark.parametrize("path", ["{tmp}/none", "./none", "a/b/c", "runs/digits student"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, path):
    path = path.format(tmp=tmp_path)
    with pytest.raises(OSError, match=f"no folder '{path}'"):
        OneStepInterpolantPipeline.from_pretrained(path)


def test_a_name_that_is_neither_a_folder_nor_a_repository():
    with pytest.raises(OSError, match=r"'nobody/nothing'.*no such folder here either"):
        OneStepInterpolantPipeline.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_file_is_not_a_folder(student):
    with pytest.raises(OSError, match=r"model_index\.json' is a file"):
        OneStepInterpolantPipeline.from_pretrained(student / "model_index.json")


def test_code_that_cannot_travel_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "far_package"
    (package / "parts").mkdir(parents=True)
    (package / "parts" / "sizes.py").write_text("SIZE = 8\n")
    (package / "network.py").write_text(
        "from si_distill import SiTTransformer2DModel\n\nfrom .parts.sizes import SIZE\n\n\n"
        "class FarNetwork(SiTTransformer2DModel):\n    size = SIZE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from far_package.network import FarNetwork

    network = FarNetwork(sample_size=8, patch_size=4, num_layers=1, num_attention_heads=1)
    pipe = OneStepInterpolantPipeline(network, StochasticInterpolantScheduler())
    with pytest.raises(ValueError, match=r"network\.py imports 'parts\.sizes' relatively.*cannot travel"):
        pipe.save_pretrained(tmp_path / "out")


def test_helpers_of_a_network_travel_if_the_network_names_them_all(tmp_path, monkeypatch, remote_code_cache):
    package = tmp_path / "near_package"
    package.mkdir()
    (package / "near_sizes.py").write_text("SIZE = 8\n")
    (package / "near_shapes.py").write_text("from .near_sizes import SIZE\n\nSHAPE = (SIZE, SIZE)\n")
    imports = "from si_distill import SiTTransformer2DModel\n\nfrom .near_shapes import SHAPE\n"
    body = "\n\nclass NearNetwork(SiTTransformer2DModel):\n    shape = SHAPE\n"
    (package / "whole_network.py").write_text(imports + "from .near_sizes import SIZE\n" + body)
    (package / "torn_network.py").write_text(imports + body)
    monkeypatch.syspath_prepend(tmp_path)
    from near_package import torn_network, whole_network

    def saved(module):
        network = module.NearNetwork(sample_size=8, patch_size=4, num_layers=1, num_attention_heads=1)
        OneStepInterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(tmp_path / "out")

    with pytest.raises(ValueError, match=r"'near_shapes' relatively.*which torn_network\.py does not import itself"):
        saved(torn_network)
    saved(whole_network)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.transformer.shape == (8, 8)
    assert type(loaded.transformer).__module__.startswith("diffusers_modules")


def test_a_network_of_the_user_s_own_travels_with_the_pipeline(tmp_path, monkeypatch):
    (tmp_path / "wide_network.py").write_text(
        "from si_distill import SiTTransformer2DModel\n\n\nclass WideNetwork(SiTTransformer2DModel):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    from wide_network import WideNetwork

    network = WideNetwork(sample_size=8, patch_size=4, num_layers=1, num_attention_heads=1)
    OneStepInterpolantPipeline(network, StochasticInterpolantScheduler()).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "transformer" / "wide_network.py").is_file()
    # The package does not have this class: it is the folder's code, and running that needs trust.
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        OneStepInterpolantPipeline.from_pretrained(tmp_path / "out")
    loaded = OneStepInterpolantPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded.transformer).__name__ == "WideNetwork"
