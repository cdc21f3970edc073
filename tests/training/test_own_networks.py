"""Network classes from outside the package, in teachers and students: on the command line's word only."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DModel

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.loading import load_pipeline
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run
from si_distill.training.teacher import plan_teacher

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIGITS = {"sample_size": 8, "in_channels": 1, "num_classes": 10}
SMALL = "--per_device_train_batch_size 4 --max_steps 1 --eval_steps 1 --save_steps 1".split()


@pytest.fixture(autouse=True)
def _own_modules():
    """Networks are imported anew, and what finds them is forgotten: the scripts add the present folder."""
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("own_network", None)


def run(script, *arguments, cwd):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(cwd / "m"),
    }
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_own_network_is_trained_and_distilled_and_its_code_runs_only_where_it_is_trusted(tmp_path):
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    made.mkdir()
    elsewhere.mkdir()
    shutil.copy(HERE / "own_network.py", made)
    teacher = ["--model_class", "own_network:OwnNetwork", "--model.width", 4, "--output_dir", elsewhere / "teacher"]
    run("training/train_teacher.py", *teacher, *SMALL, cwd=made)
    assert (elsewhere / "teacher/transformer/own_network.py").is_file()

    distil = ["--teacher", "teacher", "--output_dir", "student", *SMALL]
    with pytest.raises(InputError, match=r"brings a network class of its own.* add --trust_remote_code to the command"):
        load_pipeline(InterpolantPipeline, "teacher", str(elsewhere / "teacher"))
    run("training/train_distill.py", *distil, "--trust_remote_code", cwd=elsewhere)
    assert (elsewhere / "student/transformer/own_network.py").is_file()
    student = load_pipeline(OneStepInterpolantPipeline, "student", str(elsewhere / "student"), trust_remote_code=True)
    assert student([3], output_type="pt").images.shape == (1, 1, 8, 8)

    described = {"teacher": str(elsewhere / "teacher"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match=r"brings a network class of its own.* add --trust_remote_code to the command"):
        dry_run(DistillConfig(**described))
    parameters = sum(p.numel() for p in student.transformer.parameters())
    text = dry_run(DistillConfig(**described, trust_remote_code=True))
    assert f"OwnNetwork, {parameters:,} parameters, 1 × 8 × 8, 10 classes" in text
    assert re.search(r"of this: .*, activations [1-9]", text)
    code = elsewhere / "teacher/transformer/own_network.py"
    code.write_text(code.read_text().replace("told = ", "float(timestep.sum())\n        told = "))  # needs numbers
    text = dry_run(DistillConfig(**described, trust_remote_code=True))
    assert f"OwnNetwork, {parameters:,} parameters" in text
    assert "activations, for OwnNetwork does not run on torch's meta device" in text


@pytest.mark.parametrize(
    ("cls", "text", "words"),
    [
        (
            TeacherConfig,
            "model_class: own_network:OwnNetwork",
            "add --model_class own_network:OwnNetwork to the command",
        ),
        (DistillConfig, "trust_remote_code: true", "add --trust_remote_code true to the command"),
        (EvaluationConfig, "trust_remote_code: True", "add --trust_remote_code True to the command"),
        (TeacherConfig, "import: [own_network]", "Unknown setting `import`"),
    ],
)
def test_a_file_cannot_name_code(cls, text, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    (tmp_path / "c.yaml").write_text(f"output_dir: runs/x\n{text}\n" if cls is not EvaluationConfig else f"{text}\n")
    with pytest.raises(InputError, match=words):
        parse_settings(cls, ["--config", str(tmp_path / "c.yaml")])
    assert "own_network" not in sys.modules


def test_a_file_may_say_that_nothing_is_trusted_and_a_run_repeats_what_the_command_says(tmp_path):
    (tmp_path / "c.yaml").write_text("trust_remote_code: false\nteacher: t\noutput_dir: s\n")
    assert parse_settings(DistillConfig, ["--config", str(tmp_path / "c.yaml")]).trust_remote_code is False
    (tmp_path / "c.yaml").write_text("trust_remote_code: true\nteacher: t\noutput_dir: s\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--trust_remote_code"]
    assert parse_settings(DistillConfig, argv).trust_remote_code is True


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("OwnNetwork", "is of the form package.module:Class"),
        ("own_network:", "is of the form package.module:Class"),
        ("no_such_module:Net", "Cannot import the module of `model_class` 'no_such_module:Net'"),
        (".own_network:Net", "Cannot import the module of `model_class`"),
        ("own_network:Missing", "the module own_network has no class 'Missing'"),
        ("own_network:Plain", "inherits from ModelMixin and ConfigMixin"),
        ("os:getcwd", "inherits from ModelMixin and ConfigMixin"),
    ],
)
def test_what_is_no_network_is_refused(value, words, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    with pytest.raises(InputError, match=words):
        plan_teacher(TeacherConfig(output_dir="runs/x", model_class=value), **DIGITS)


def test_two_classes_are_one_too_many():
    with pytest.raises(InputError, match="leave one of them out"):
        TeacherConfig(output_dir="runs/x", model_class="a:B", model={"class": "SiTTransformer2DModel"})


@pytest.mark.parametrize(("given", "classes"), [({}, 10), ({"num_class_embeds": None}, 0)])
def test_a_class_of_diffusers_is_told_the_images_in_its_own_words(given, classes):
    small = {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    settings = TeacherConfig(
        output_dir="runs/x", model_class="diffusers:UNet2DModel", model={**small, "out_channels": 1, **given}
    )
    plan = plan_teacher(settings, **DIGITS)
    assert type(plan.network) is UNet2DModel
    teacher = InterpolantPipeline(plan.network, plan.scheduler)
    assert (teacher.network.num_classes, teacher.network.sample_shape) == (classes, (1, 8, 8))
    what = {"class_labels": [1, 2]} if classes else {"batch_size": 2}
    assert teacher(**what, num_inference_steps=1, output_type="pt").images.shape == (2, 1, 8, 8)
