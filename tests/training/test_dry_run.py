"""`--dry_run` says what a run would do, reads configs alone, and writes nothing."""

import json
import re
import shutil
import sys

import pytest
from helpers import tiny_sit
from script_runs import ROOT, run

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.settings import settings_from_dict
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run

SIT = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "num_layers": 1, "num_attention_heads": 2}


def distillation(**values) -> DistillConfig:
    return settings_from_dict(DistillConfig, {"output_dir": "run", "teacher": "nowhere", **values})


@pytest.mark.parametrize("script", ["train_teacher.py", "train_distill.py"])
def test_scripts_print_and_leave_nothing(script, tmp_path):
    config = {"train_teacher.py": "digits/teacher.yaml", "train_distill.py": "imagenet512/distill_xs.yaml"}[script]
    arguments = ["--config", ROOT / "configs" / config, "--dry_run", "--output_dir", tmp_path / "run"]
    done = run(sys.executable, ROOT / "training" / script, *arguments)
    assert "Dry run: nothing was loaded, trained or written." in done.stdout
    expected = {"train_teacher.py": "254,276 parameters", "train_distill.py": "124,713,125 parameters"}[script]
    assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_teachers_folder_is_described_by_its_configs_alone(teacher_folder, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    parameters = sum(p.numel() for p in InterpolantPipeline.from_pretrained(teacher_folder).transformer.parameters())
    text = dry_run(distillation(teacher=str(folder), teacher_model={"class": "EDMUNet2DModel"}))
    assert f"SiTTransformer2DModel, {parameters:,} parameters, 1 × 8 × 8, 10 classes" in text
    assert "its configs were read" in text


def test_a_description_and_the_folder_it_stands_for_give_the_same_report(tmp_path):
    network = tiny_sit(num_classes=10)
    scheduler = StochasticInterpolantScheduler(interpolant="vp", prediction_type="epsilon")
    InterpolantPipeline(network, scheduler).save_pretrained(tmp_path / "teacher")
    described = {
        **{name: network.config[name] for name in (*SIT, "patch_size", "attention_head_dim", "timestep_scale")},
        "scheduler": {"interpolant": "vp", "prediction_type": "epsilon"},
    }
    reports = [
        dry_run(distillation(teacher=teacher, teacher_model=described, objective="realuid")).splitlines()
        for teacher in (str(tmp_path / "teacher"), "nowhere")
    ]
    assert [line for line in reports[0] if not line.startswith("teacher")] == [
        line for line in reports[1] if not line.startswith("teacher")
    ]


def test_says_what_images_and_files_a_run_needs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    common = dict(
        teacher_model=SIT, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=10, critic_steps=5
    )
    lines = dry_run(distillation(**common))
    assert "4 per device × 2 micro-batches × 3 processes = 24 images per update" in lines
    assert "10 iterations × 24 = 240 images" in lines
    assert "5 of the critic, then 1 of the student in an iteration, shared draws" in lines
    assert "no images" in lines
    assert "digits, split train, 8 × 8 pixels" in dry_run(distillation(**common, objective="realuid"))
    student = dry_run(distillation(**common, student="runs/first"))
    assert "from runs/first (not opened)" in student


def test_memory_of_further_averages_and_a_head_is_counted():
    def total(**values) -> dict[str, float]:
        line = re.search(r"of this: +(.*)", dry_run(distillation(teacher_model=SIT, **values)))[1]
        return {part.rsplit(" ", 2)[0]: float(part.rsplit(" ", 2)[1]) for part in line.split(", ")}

    plain, averaged = total(), total(ema_extra=[0.9])
    assert averaged["moving averages (2)"] == pytest.approx(2 * plain["moving averages (1)"], rel=0.01)
    judged = total(adversarial={"kind": "head"})
    assert judged["trained parameters"] > plain["trained parameters"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["Cannot read the configs of the teacher 'nowhere'", "`teacher_model`"]),
        ({"teacher_model": {"class": "Transformer"}}, ["`teacher_model.class` is 'Transformer'", "EDMUNet2DModel"]),
        ({"teacher_model": {**SIT, "depth": 3}}, ["Unknown setting `teacher_model.depth`"]),
        ({"teacher_model": {"class": "EDMUNet2DModel", "preset": "L"}}, ["`teacher_model.preset`", "no named sizes"]),
        ({"teacher_model": {"preset": "SiT-XS/2"}}, ["Unknown preset 'SiT-XS/2'"]),
        ({"teacher_model": {**SIT, "scheduler": "edm"}}, ["`teacher_model.scheduler` must be settings"]),
        ({"teacher_model": {**SIT, "scheduler": {"interpolant": "linar"}}}, ["teacher_model.scheduler", "'linar'"]),
        ({"teacher_model": {"training": "a.yaml", "class": "x"}}, ["cannot be combined"]),
        ({"teacher_model": {**SIT, "class_dropout_prob": 0.0}, "guidance_scale": 2.0}, ["need a null class"]),
        ({"teacher_model": SIT, "t_min": 0.0}, ["must be above 0", "`t_min`"]),
        ({"teacher_model": SIT, "objective_kwargs": {"critic_weight": "edm"}}, ["EDM's preconditioning", "'linear'"]),
        (
            {"teacher_model": SIT, "adversarial": {"kind": "head", "head": "dmd2"}},
            ["larger map than the 4 × 4 of the network's middle features", "`adversarial.head` to mlp"],
        ),
        (
            {"teacher_model": {"class": "UNet2DModel", "sample_size": 8}, "augment_prob": 0.1},
            ["augmentation would leak"],
        ),
    ],
)
def test_mistakes_are_those_of_the_run(values, words):
    with pytest.raises(InputError) as caught:
        dry_run(distillation(**values))
    for word in words:
        assert word in str(caught.value)


def test_a_teachers_training_needs_what_the_data_set_would_say(tmp_path):
    settings = dict(output_dir=str(tmp_path / "run"), data={"name": "uoft-cs/cifar10", "image_size": 32})
    with pytest.raises(InputError, match=r"set `model\.in_channels` and `model\.num_classes`"):
        dry_run(settings_from_dict(TeacherConfig, settings))
    model = {"class": "EDMUNet2DModel", "in_channels": 3, "num_classes": 0}
    text = dry_run(settings_from_dict(TeacherConfig, {**settings, "model": model, "augment_prob": 0.1}))
    assert "EDMUNet2DModel" in text
    assert "3 × 32 × 32, unconditional" in text


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"output_dir": str(tmp_path), "teacher": "t"}))
    with pytest.raises(InputError, match="already holds a run"):
        dry_run(distillation(output_dir=str(tmp_path), teacher_model=SIT))


def test_neither_a_dry_run_nor_a_description_of_the_teacher_makes_another_run(tmp_path):
    (tmp_path / "config.yaml").write_text(
        json.dumps({"output_dir": str(tmp_path), "teacher": "nowhere", "algorithm": DistillConfig.ALGORITHM})
    )
    again = dict(output_dir=str(tmp_path), resume_from_checkpoint="latest", dry_run=True, teacher_model=SIT)
    assert "iterations" in dry_run(distillation(**again))
    with pytest.raises(InputError, match="started with other settings"):
        dry_run(distillation(**again, seed=5))


def test_a_file_is_no_teacher(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="it is a file, and a folder is needed"):
        dry_run(distillation(teacher=str(tmp_path / "file")))


def test_a_class_that_an_index_names_is_not_imported_from_anywhere(teacher_folder, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["antigravity", "Anything"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sys.modules.pop("antigravity", None)
    with pytest.raises(InputError, match="its vae has the class Anything of antigravity"):
        dry_run(distillation(teacher=str(folder)))
    assert "antigravity" not in sys.modules
