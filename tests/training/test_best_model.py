"""Measurements while training: they disturb nothing, and the best pipeline is kept."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from si_distill import OneStepInterpolantPipeline
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig, MeasurementConfig
from si_distill.evaluation.report import evaluate
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.distillation.trainer import DistillationTrainer
from si_distill.training.teacher import TeacherTrainer


def settings(teacher_folder, folder, **changes) -> DistillConfig:
    defaults = dict(
        output_dir=str(folder),
        teacher=str(teacher_folder),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        ema_decay=0.5,
        logging_steps=1,
        evaluation=MeasurementConfig(num_samples=64, batch_size=48),
    )
    return DistillConfig(**{**defaults, **changes})


def lines(folder, name) -> list[dict]:
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    own = ("images_per_second", "data_wait", "peak_memory_gb", "run")
    return [{key: value for key, value in line.items() if key not in own} for line in found]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_measuring_changes_no_bit_of_the_training_and_the_best_is_kept(teacher_folder, tmp_path):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    DistillationTrainer(settings(teacher_folder, plain)).train()
    DistillationTrainer(settings(teacher_folder, measured, eval_metric_steps=2)).train()
    assert lines(plain, "metrics.jsonl") == lines(measured, "metrics.jsonl")
    for name, value in weights(plain).items():
        assert value.equal(weights(measured)[name]), name

    found = lines(measured, "evaluations.jsonl")
    assert [line["step"] for line in found] == [2, 4, 6]
    best = min(found, key=lambda line: line["frechet_distance"])
    kept = json.loads((measured / "best" / "evaluation.json").read_text())
    assert (kept["step"], kept["frechet_distance"]) == (best["step"], best["frechet_distance"])
    assert (measured / "best" / "samples.png").stat().st_size > 0
    assert len(OneStepInterpolantPipeline.from_pretrained(measured / "best")([1]).images) == 1
    # The figure is that of evaluate.py on the kept folder.
    again = evaluate(EvaluationConfig(pipeline=str(measured / "best"), num_samples=64, metrics=["fid"]))
    assert again["rows"][0]["Fréchet distance"] == pytest.approx(kept["frechet_distance"], rel=1e-3)


def test_a_resumed_run_goes_on_with_the_best_so_far(teacher_folder, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    common = dict(eval_metric_steps=1, save_steps=3, metric_for_best_model="kid")
    DistillationTrainer(settings(teacher_folder, whole, **common)).train()
    DistillationTrainer(settings(teacher_folder, folder, **common, max_steps=4)).train()
    # A kill between the two renames that replace best/, and measurements past the checkpoint that is resumed from.
    (folder / "best").rename(folder / ".best.old")
    (folder / "checkpoints" / "step_00000004" / "manifest.json").unlink()
    resumed = settings(teacher_folder, folder, **common, resume_from_checkpoint="latest")
    DistillationTrainer(resumed).train()
    found, expected = (lines(path, "evaluations.jsonl") for path in (folder, whole))
    assert found == expected  # `best` too: the best so far is that of the steps before
    kept = [json.loads((path / "best" / "evaluation.json").read_text()) for path in (folder, whole)]
    assert kept[0] == kept[1]
    assert not list(folder.glob(".best*"))


def test_a_teacher_is_measured_with_its_steps(tmp_path):
    config = TeacherConfig(
        output_dir=str(tmp_path / "run"),
        model=dict(patch_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8),
        max_steps=2,
        per_device_train_batch_size=8,
        eval_metric_steps=1,
        evaluation=MeasurementConfig(num_samples=8, num_inference_steps=2),
    )
    TeacherTrainer(config).train()
    assert lines(tmp_path / "run", "evaluations.jsonl")[0]["best"]
    # Images of other steps are others, and their figure begins anew.
    more = replace(config.evaluation, num_inference_steps=1)
    TeacherTrainer(replace(config, max_steps=3, evaluation=more, resume_from_checkpoint="latest")).train()
    *_, before, last = lines(tmp_path / "run", "evaluations.jsonl")
    assert last["best"]
    assert last["how"] != before["how"]


def test_what_another_metric_has_chosen_is_replaced_first(teacher_folder, tmp_path):
    def train(steps, metric, resume="latest"):
        changes = dict(max_steps=steps, metric_for_best_model=metric, resume_from_checkpoint=resume)
        DistillationTrainer(settings(teacher_folder, tmp_path / "run", eval_metric_steps=1, **changes)).train()
        return lines(tmp_path / "run", "evaluations.jsonl")

    kept = tmp_path / "run" / "best" / "evaluation.json"
    train(2, "frechet_distance", None)
    assert train(3, "kid")[-1]["best"]
    assert train(4, "frechet_distance")[-1]["best"]
    found = json.loads(kept.read_text())
    assert (found["step"], found["how"]["metric_for_best_model"]) == (4, "frechet_distance")

    kept.write_text('{"rows": []}')  # what evaluate.py leaves there
    distances = [line["frechet_distance"] for line in train(6, "frechet_distance")]
    best = [line["best"] for line in lines(tmp_path / "run", "evaluations.jsonl")]
    so_far = [min(distances[:2] + distances[3:n]) for n in (4, 5)]  # all of this metric; that of KID does not count
    assert best[4:] == [distances[n] < least for n, least in zip((4, 5), so_far, strict=True)]


def test_what_cannot_be_measured_is_refused_before_anything_is_written(teacher_folder, tmp_path):
    with pytest.raises(InputError, match="eval_metric_steps"):
        settings(teacher_folder, tmp_path / "run", eval_metric_steps=0)
    unknown = settings(
        teacher_folder, tmp_path / "run", eval_metric_steps=2, evaluation=MeasurementConfig(features="vgg")
    )
    with pytest.raises(InputError, match="Unknown `features`"):
        DistillationTrainer(unknown)
    assert not (tmp_path / "run").exists()
