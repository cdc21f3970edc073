"""Without classes: a teacher from images with and without labels, its distillation, evaluation and sampling."""

import runpy

import pytest
import torch
from PIL import Image
from script_runs import ROOT
from trainer_builders import distillation, teaching

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
from si_distill.data import DataConfig, load_images
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.report import evaluate


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "teacher"
    teaching(folder, "--data.label_column", "none", "--max_steps", "2").train()
    return folder


def test_images_without_labels_make_an_unconditional_teacher(teacher):
    pipe = InterpolantPipeline.from_pretrained(teacher)
    assert pipe.network.num_classes == 0
    assert pipe.transformer.class_embed is None
    assert pipe.config.id2label is None
    assert pipe(batch_size=3, num_inference_steps=2, output_type="pt").images.shape == (3, 1, 8, 8)
    assert (teacher / "samples" / "step_00000002.png").is_file()


def test_an_unconditional_teacher_ignores_the_labels_of_its_images(tmp_path, teacher):
    arguments = [
        "--model",
        "{num_classes: 0, patch_size: 4, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8}",
    ]
    teaching(tmp_path / "t", *arguments, "--max_steps", "2").train()
    labelled, unlabelled = (InterpolantPipeline.from_pretrained(f).transformer for f in (tmp_path / "t", teacher))
    for a, b in zip(labelled.parameters(), unlabelled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_classes_without_labels_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"`model.num_classes` is 10, but the data set has 0"):
        teaching(tmp_path, "--data.label_column", "none", "--model", "{num_classes: 10}")


@pytest.mark.parametrize("labels", ["none", None], ids=["unlabelled", "labelled"])
def test_an_unconditional_teacher_is_distilled_evaluated_and_sampled(teacher, tmp_path, labels):
    column = ["--data.label_column", labels] if labels else []
    extra = ["--objective", "realuid", "--adversarial.kind", "encoder", "--max_steps", "2", "--eval_steps", "2"]
    distillation(teacher, tmp_path / "s", *extra, *column).train()
    assert OneStepInterpolantPipeline.from_pretrained(tmp_path / "s").network.num_classes == 0
    data = DataConfig(label_column=labels, max_train_samples=20)
    settings = EvaluationConfig(pipeline=str(tmp_path / "s"), teacher=str(teacher), teacher_steps=[2], data=data)
    result = evaluate(settings)
    assert [row["label accuracy"] for row in result["rows"]] == [None] * 3
    assert (tmp_path / "s" / "evaluation.png").is_file()


def test_generate_draws_images_without_labels(teacher, tmp_path):
    pipe = InterpolantPipeline.from_pretrained(teacher)
    OneStepInterpolantPipeline(pipe.transformer, pipe.scheduler).save_pretrained(tmp_path / "s")
    main = runpy.run_path(str(ROOT / "pipelines" / "generate.py"))["main"]
    arguments = ["--pipeline", str(tmp_path / "s"), "--out", str(tmp_path / "grid.png"), "--images_per_label", "3"]
    main(arguments)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 2 * grid.width
    with pytest.raises(InputError, match="The class 3 was given, but this network is unconditional"):
        main([*arguments, "--labels", "3"])


def test_a_game_without_images_needs_no_labels(teacher, tmp_path):
    trainer = distillation(teacher, tmp_path / "s", "--objective", "sid")
    assert trainer.data is None
    _, finite = trainer.iteration()
    assert finite


def test_guidance_of_an_unconditional_teacher_is_refused(teacher, tmp_path):
    with pytest.raises(InputError, match=r"need a null class, but the teacher was trained .* without labels"):
        distillation(teacher, tmp_path / "s", "--guidance_scale", "2")


def test_unlabelled_digits():
    data = load_images(DataConfig(label_column="none"))
    assert data.class_names == []
    assert data[3]["labels"] == 0
    assert torch.equal(data[3]["images"], load_images(DataConfig())[3]["images"])
