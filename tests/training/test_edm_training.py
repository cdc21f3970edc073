"""EDM's and EDM2's networks as teachers: distillation by the real trainer, and the student that comes out."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny_edm, tiny_edm2
from test_trainers import distillation

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.training.distillation.flow_map import TIME_FEATURES

NETWORKS = {
    "ncsnpp": lambda: tiny_edm("ncsnpp", in_channels=1, num_classes=0, augment_dim=9, dropout=0.1),
    "adm": lambda: tiny_edm("adm", in_channels=1, num_classes=10, augment_dim=0),
    "edm2": lambda: tiny_edm2(in_channels=1, num_classes=10),
}


@pytest.fixture(scope="module", params=NETWORKS)
def teacher(request, tmp_path_factory):
    scheduler = StochasticInterpolantScheduler(
        interpolant="edm", prediction_type="edm", timestep_type="log_sigma", solver="heun"
    )
    folder = tmp_path_factory.mktemp("edm") / request.param
    InterpolantPipeline(NETWORKS[request.param](), scheduler).save_pretrained(folder)
    return folder


def test_ten_iterations_make_a_student_that_loads_everywhere(teacher, tmp_path):
    arguments = ["--objective", "sid", "--adversarial.kind", "encoder", "--max_steps", 10, "--eval_steps", 10]
    distillation(teacher, tmp_path / "s", *arguments).train()
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 10
    assert (tmp_path / "s" / "samples" / "step_00000010.png").is_file()
    gradients = [line[f"{name}_grad_norm"] for line in lines for name in ("generator", "critic")]
    assert all(0 < value < float("inf") for value in gradients)

    student = OneStepInterpolantPipeline.from_pretrained(tmp_path / "s")
    assert student.scheduler.init_noise_sigma == pytest.approx(2.5, rel=1e-5)
    labels = [0, 2] if student.network.num_classes else None
    arguments = dict(class_labels=labels, batch_size=None if labels else 2, output_type="pt")
    images = student(generator=torch.Generator().manual_seed(0), **arguments).images
    anywhere = DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)
    assert torch.equal(anywhere(generator=torch.Generator().manual_seed(0), **arguments).images, images)
    before = InterpolantPipeline.from_pretrained(teacher).transformer.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in student.transformer.state_dict().items())


def test_the_flow_map_term_next_to_augmentation_labels(tmp_path):
    """The second time comes after the labels, which the critic alone is told."""
    scheduler = StochasticInterpolantScheduler(interpolant="edm", prediction_type="edm", timestep_type="log_sigma")
    network = tiny_edm("ncsnpp", in_channels=1, num_classes=0, augment_dim=9)
    InterpolantPipeline(network, scheduler).save_pretrained(tmp_path / "teacher")
    arguments = ["--augment_prob", 0.5, "--data.name", "digits", "--flow_map.weight", 0.5, "--flow_map.starts", "both"]
    trainer = distillation(tmp_path / "teacher", tmp_path / "s", *arguments, "--max_steps", 3)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["flow_map_residual"] < float("inf") for line in lines)
    told = trainer.generator.unwrapped.map_augment.weight
    assert told.shape[1] == 9 + TIME_FEATURES
    assert torch.equal(told[:, :9], network.map_augment.weight)  # the student is told no augmentation
    assert bool(told[:, 9:].any())
    assert trainer.critic.unwrapped.network.config.augment_dim == 9
    images = [
        load(tmp_path / "s")(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for load in (
            OneStepInterpolantPipeline.from_pretrained,
            lambda folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
        )
    ]
    assert torch.equal(*images)
