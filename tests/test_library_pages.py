"""docs/library.md and docs/your-network.md: their code as it stands there, with fewer steps."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from si_distill import (
    InterpolantPipeline,
    OneStepInterpolantPipeline,
    SampleNoise,
    StochasticInterpolantScheduler,
    get_objective,
    load_pipeline,
)
from si_distill.errors import InputError
from si_distill.objectives import PRESETS
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.teacher import plan_teacher

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def quick(code: str) -> str:
    """The same code with 2 steps."""
    code, changed = re.subn(r"^STEPS(.*?)= \d+", r"STEPS\1= 2", code, flags=re.MULTILINE)
    assert changed == 1
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch, remote_code_cache):
    """An own folder, as the pages' reader has one; what is imported from it is forgotten."""
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    for name in ("configs", "training"):
        (tmp_path / "here" / name).symlink_to(ROOT / name)
    presets = dict(PRESETS)
    yield tmp_path / "here"
    for name in ("my_network", "my_objectives"):
        sys.modules.pop(name, None)
    PRESETS.clear()
    PRESETS.update(presets)


def test_the_loop_of_the_page_is_short_and_leaves_a_student(folder, teacher_folder):
    (folder / "runs/digits-teacher").symlink_to(teacher_folder)
    code = blocks("library.md", "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 60
    torch.manual_seed(0)
    names: dict = {}
    exec(quick(code), names)
    student = load_pipeline(OneStepInterpolantPipeline, "student", "runs/my-student")
    assert student([3, 7], output_type="pt").images.shape == (2, 1, 8, 8)
    assert student.scheduler.config.init_time == 1.0
    teacher = names["teacher"].transformer
    for trained in (names["student"], names["critic"], student.transformer):
        changes = [not torch.equal(*pair) for pair in zip(trained.parameters(), teacher.parameters(), strict=True)]
        assert sum(changes) > len(changes) // 2
    # The student's gradient goes through x_t and all three fields: that of the formula itself, in sample space.
    objective, noise = names["objective"], SampleNoise(1)
    x0 = noise.normal((1, 8, 8), "samples", indices=range(3)).requires_grad_()
    _, _, (learned, taught, target) = names["fields"](x0, names["Condition"](torch.tensor([0, 1, 2])), "critic", 0)
    assert target is x0
    delta = learned - taught
    by_hand = (2 * delta * x0 - 2 * delta * taught - 2 * delta**2).flatten(1).mean(1)
    torch.testing.assert_close(objective.generator_loss(learned, taught, target), by_hand)


def test_an_objective_that_a_module_registers_is_known_to_the_scripts(folder):
    (folder / "my_objectives.py").write_text(blocks("library.md", "python")[1])
    argv = shlex.split(blocks("library.md", "bash")[1].replace("\\\n", " "))[2:]
    with pytest.raises(InputError, match="Unknown objective 'damped_gap'"):
        parse_settings(DistillConfig, [word for word in argv if word not in ("--import", "my_objectives")])
    assert parse_settings(DistillConfig, argv).build_objective().generator == (1, 1, 2.0)
    assert get_objective("damped_gap").generator == (1, 1, 1.5)
    with pytest.raises(InputError, match="Cannot import 'no_such_module'"):
        parse_settings(DistillConfig, ["--import", "no_such_module", *argv])


def test_a_network_of_an_own_loop_becomes_a_teacher_and_means_what_the_loop_taught_it(folder):
    network, loop, look, _ = blocks("your-network.md", "python")
    (folder / "my_network.py").write_text(network)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 32
    names: dict = {}
    exec(quick(loop), names)
    exec(look, names)
    assert (folder / "runs/my-teacher/three.png").is_file()
    assert (folder / "runs/my-teacher/transformer/my_network.py").read_text() == network
    teacher = names["teacher"]
    # One Euler step of the loop's own convention: from noise at s = 0, along what the network predicts there, to data.
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    with torch.no_grad():
        expected = noise + names["network"](noise, torch.zeros(2), labels, return_dict=False)[0]
        half = 0.5 * names["network"](noise, torch.zeros(2), labels, return_dict=False)[0] + noise
        two = half + 0.5 * names["network"](half, torch.full((2,), 0.5), labels, return_dict=False)[0]
    given = dict(latents=noise, output_type="latent")
    torch.testing.assert_close(teacher(labels, num_inference_steps=1, **given).images, expected)
    torch.testing.assert_close(teacher(labels, num_inference_steps=2, **given).images, two)


def test_a_unet_becomes_a_teacher(folder):
    exec(blocks("your-network.md", "python")[3], names := {})
    teacher = load_pipeline(InterpolantPipeline, "teacher", "runs/unet-teacher")
    noise, labels = torch.randn(1, 1, 8, 8), torch.tensor([4])
    with torch.no_grad():
        expected = noise - names["unet"].eval()(noise, torch.tensor([1000.0]), labels).sample
    made = teacher(labels, num_inference_steps=1, latents=noise, output_type="latent").images
    torch.testing.assert_close(made, expected)


def test_the_commands_of_the_page_are_understood(folder):
    (folder / "my_network.py").write_text(blocks("your-network.md", "python")[0])
    distil, trainings = blocks("your-network.md", "bash")
    argv = shlex.split(distil.replace("\\\n", " "))[2:]
    assert parse_settings(DistillConfig, argv).trust_remote_code is True
    for command, class_name in zip(re.split(r"\n(?=python)", trainings), ("MyNetwork", "UNet2DModel"), strict=True):
        settings = parse_settings(TeacherConfig, shlex.split(command.replace("\\\n", " "))[2:])
        plan = plan_teacher(settings, sample_size=8, in_channels=1, num_classes=10)
        assert type(plan.network).__name__ == class_name


def test_every_setting_in_the_table_of_conventions_is_one_of_the_scheduler():
    page = (ROOT / "docs/your-network.md").read_text(encoding="utf-8")
    table = page.split("### What the scheduler says")[1].split("###")[0]
    cells = [line.strip("| ").split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][2:]
    known = StochasticInterpolantScheduler().config
    for name in re.findall(r"`(\w+)=", "\n".join(cells)):
        assert name in known
    pairs = [dict(re.findall(r'`(\w+)="(\w+)"`', cell)) for cell in cells]
    for settings in filter(None, pairs):
        StochasticInterpolantScheduler(init_time=0.98, **settings)
