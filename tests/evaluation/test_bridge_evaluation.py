"""Evaluation of pipelines that turn images into others: inputs by index, truth beside them, and what is refused."""

import json

import pytest
import torch
from helpers import tiny_sit
from trainer_builders import teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.data import DataConfig, load_images
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.formulas import peak_signal_to_noise
from si_distill.evaluation.inputs import Inputs
from si_distill.evaluation.report import evaluate
from si_distill.evaluation.samples import SPREAD_INPUTS, PipelineSource
from si_distill.visualization import to_uint8

MASKED = DataConfig(split="train[1700:]", degradation="inpaint", degradation_kwargs={"mask": "random"})


def bridge(cls, condition_channels, num_classes=10, **scheduler):
    network = tiny_sit(condition_channels=condition_channels, num_classes=num_classes)
    pipeline = cls(network, StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample", **scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student with noise and its teacher, with random weights; unconditional."""
    folder = tmp_path_factory.mktemp("bridge")
    bridge(InterpolantPipeline, 1, 0).save_pretrained(folder / "teacher")
    bridge(OneStepInterpolantPipeline, 2, 0, noise_channels=1).save_pretrained(folder / "student")
    return {"teacher": str(folder / "teacher"), "pipeline": str(folder / "student")}


def test_inputs_depend_on_the_seed_and_the_index_alone():
    data = load_images(MASKED)
    places = [5, 3, 3, 90]
    inputs = Inputs(data, MASKED, places, seed=1)
    whole, truth = inputs.read(range(4)), inputs.truth(range(4))
    assert torch.equal(truth, torch.stack([data.read(place) for place in places]))
    kept = whole != 0
    assert torch.equal(whole[kept], (truth.float() / 127.5 - 1)[kept])
    assert not torch.equal(whole[1], whole[2])  # the same image behind another mask
    assert torch.equal(inputs.read([2, 0]), whole[[2, 0]])
    other = Inputs(data, MASKED, places, seed=2)
    assert not torch.equal(other.read(range(4)), whole)
    assert other.identity != inputs.identity
    assert Inputs(data, MASKED, places, seed=1).identity == inputs.identity


def test_peak_signal_to_noise_of_known_images():
    truth = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    images = truth.clone()
    images[0], images[1, :, :2] = 255, 51
    # 10 log10(255² / 255²), (255² / (51² / 2)); equal images count as one level apart.
    found = peak_signal_to_noise(images, truth)
    assert found.tolist() == pytest.approx([0.0, 13.9794 + 3.0103, 48.1308], abs=1e-4)


def test_images_of_a_bridge_are_compared_with_the_truth_and_each_other():
    pipeline = bridge(OneStepInterpolantPipeline, 2, noise_channels=1)
    data = load_images(MASKED)
    inputs = Inputs(data, MASKED, list(range(97)), seed=0)
    source = PipelineSource(
        pipeline, lambda **given: pipeline(**given, output_type="pt"), data.labels, 0, inputs=inputs
    )
    indices = [2, 70, SPREAD_INPUTS - 1]
    batch = source.read(indices)
    assert batch.rows == 3
    assert batch.labels == [data.labels[i] for i in indices]
    noise = source._noise.normal((1, 8, 8), "evaluation", indices=indices)
    given = pipeline(batch.labels, image=inputs.read(indices), latents=noise, output_type="latent").images
    assert torch.equal(batch.images, to_uint8(given.clamp(-1, 1)))
    assert batch.compared["psnr"].tolist() == peak_signal_to_noise(batch.images, inputs.truth(indices)).tolist()
    spread = batch.compared["spread"]
    assert spread[0] > 0
    assert spread[2] > 0
    assert spread[1] != spread[1]  # only of the first inputs
    assert torch.equal(source.read([70]).images, batch.images[1:2])
    # A map without noise has no spread.
    certain = bridge(OneStepInterpolantPipeline, 1)
    source = PipelineSource(certain, lambda **given: certain(**given, output_type="pt"), data.labels, 0, inputs=inputs)
    assert source.read([2]).compared["spread"].tolist() == [0.0]


def test_a_bridge_s_table_has_its_inputs_and_their_truth(folders, tmp_path):
    settings = EvaluationConfig(
        **folders,
        data=MASKED,
        teacher_steps=[3],
        metrics=["fid"],
        bootstrap_resamples=0,
        output=str(tmp_path / "result.json"),
    )
    rows = {row["generator"]: row for row in evaluate(settings)["rows"]}
    assert list(rows) == ["input", "teacher, 3 steps", "student, 1 step", "real half against real half"]
    assert rows["input"]["network evaluations"] is None
    assert rows["teacher, 3 steps"]["network evaluations"] == 3
    assert rows["student, 1 step"]["network evaluations"] == 1
    assert rows["input"]["PSNR"] > rows["student, 1 step"]["PSNR"]  # of random weights
    assert rows["student, 1 step"]["diversity"] > 0
    # The classes are those of the inputs, though the networks have none.
    assert 0 <= rows["student, 1 step"]["label accuracy"] < rows["input"]["label accuracy"]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["rows"][0]["made"]["references"] == "the images after inpaint (mask random)"
    assert "PSNR" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").exists()


@pytest.mark.parametrize("change", [dict(data=DataConfig(split="train[1700:]")), dict(class_balance="uniform")])
def test_inputs_that_are_not_known_are_refused(folders, tmp_path, change):
    settings = EvaluationConfig(**{**folders, "data": MASKED, "output": str(tmp_path / "result.json"), **change})
    with pytest.raises(InputError, match="turns images into others, so its inputs must be known: set `data`"):
        evaluate(settings)


def test_a_bridge_beside_a_generator_from_noise_is_refused(folders, tmp_path):
    InterpolantPipeline(tiny_sit(num_classes=0), StochasticInterpolantScheduler()).save_pretrained(tmp_path / "noise")
    settings = EvaluationConfig(pipeline=folders["pipeline"], teacher=str(tmp_path / "noise"), data=MASKED)
    with pytest.raises(InputError, match="one turns images into others and the other does not"):
        evaluate(settings)


def test_the_best_bridge_is_measured_while_it_trains(tmp_path):
    arguments = ["--interpolant", "bridge", "--prediction_type", "sample", "--data.degradation", "blur"]
    arguments += ["--data.split", "train[1700:]", "--max_steps", 2, "--eval_metric_steps", 1]
    trainer = teaching(tmp_path, *arguments, "--evaluation.num_samples", 20, "--evaluation.num_inference_steps", 2)
    trainer.train()
    figures = [json.loads(line)["frechet_distance"] for line in (tmp_path / "evaluations.jsonl").open()]
    assert len(figures) == 2
    assert figures[0] != figures[1]
