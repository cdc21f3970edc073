"""Teachers on reference images: what the network is given, what resumes, what is refused."""

import json
from itertools import permutations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from trainer_builders import teaching

from si_distill import InterpolantPipeline
from si_distill.errors import InputError
from si_distill.interpolants import get_interpolant

BRIDGE = ["--interpolant", "bridge", "--prediction_type", "sample"]
PAIRS = ["--data.degradation", "downsample", "--data.degradation_kwargs", "{factor: 2}"]
HOLES = ["--data.degradation", "inpaint", "--data.degradation_kwargs", "{mask: random}", "--data.random_flip", "true"]
UNPAIRED_BRIDGE = ["--interpolant", "bridge", "--t_min", "0.01", "--t_max", "0.99"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Settings of unpaired references: 40 grey squares of 8×8 pixels."""
    file = tmp_path_factory.mktemp("squares") / "squares.parquet"
    images = [Image.fromarray(np.full((8, 8), 6 * n, np.uint8)) for n in range(40)]
    features = datasets.Features({"square": datasets.Image()})
    datasets.Dataset.from_dict({"square": images}, features=features).to_parquet(str(file))
    return ["--data.reference_name", "parquet", "--data.reference_files", file]


def iterated(trainer):
    """What the trained network was given in one iteration, what it said, and the loss."""
    found = {}

    def hook(module, args, kwargs, output):
        found.update(x_t=args[0], t=args[1], labels=args[2], output=output[0].detach(), **kwargs)

    handle = trainer.trained.unwrapped.register_forward_hook(hook, with_kwargs=True)
    found["loss"] = trainer.iteration()[0]["loss"]
    handle.remove()
    return found


def test_a_paired_bridge_regresses_the_sample_at_x_t_beside_the_reference(tmp_path):
    trainer = teaching(tmp_path / "run", *BRIDGE, *PAIRS, "--interpolant_kwargs", "{scale: 0.5}")
    x0, found = next(trainer.data.batches(4))["images"], iterated(trainer)
    x1 = torch.nn.functional.avg_pool2d(x0, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(found["condition"], x1)
    t = found["t"][:, None, None, None]
    z = (found["x_t"] - (1 - t) * x0 - t * x1) / (0.5 * (t * (1 - t)).sqrt())
    u, noise = trainer.noise.uniform_and_normal((1, 8, 8), "teacher", 0, indices=range(4))
    torch.testing.assert_close(z, noise, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found["t"], u)
    torch.testing.assert_close(found["loss"], (found["output"] - x0).square().mean())


def test_an_unpaired_bridge_regresses_the_velocity_and_does_not_see_the_reference(tmp_path, squares):
    trainer = teaching(tmp_path / "run", *UNPAIRED_BRIDGE, *squares, "--data.coupling", "optimal_transport")
    found = iterated(trainer)
    assert "condition" not in found
    batch = next(trainer.data.batches(4))
    x0, squares_of_batch = batch["images"], batch["reference"]
    cost = (x0[:, None] - squares_of_batch).square().sum((2, 3, 4))
    order = min(permutations(range(4)), key=lambda p: float(sum(cost[i, p[i]] for i in range(4))))
    x1 = squares_of_batch[list(order)]
    _, z = trainer.noise.uniform_and_normal((1, 8, 8), "teacher", 0, indices=range(4))
    path = get_interpolant("bridge")
    torch.testing.assert_close(found["x_t"], path.interpolate(x0, x1, found["t"], z))
    velocity = path.velocity(x0, x1, found["t"], z)
    torch.testing.assert_close(found["loss"], (found["output"] - velocity).square().mean())


def test_a_teacher_on_noise_sees_the_reference_too(tmp_path):
    trainer = teaching(tmp_path / "run", *PAIRS)
    found = iterated(trainer)
    x0 = next(trainer.data.batches(4))["images"]
    _, x1 = trainer.noise.uniform_and_normal((1, 8, 8), "teacher", 0, indices=range(4))
    torch.testing.assert_close(found["x_t"], get_interpolant("linear").interpolate(x0, x1, found["t"]))
    assert found["condition"].shape == x0.shape
    assert not torch.equal(found["condition"], x0)
    pipeline = trainer.pipeline()
    assert (pipeline.is_bridge, pipeline.image_channels) == (False, 1)


@pytest.mark.parametrize("kind", ["masks", "unpaired"])
def test_a_resumed_run_sees_the_same_references(tmp_path, squares, kind):
    """Masks, flips and both orders of two data sets: the weights after a stop are those of a run without one."""
    arguments = [*BRIDGE, *HOLES] if kind == "masks" else [*UNPAIRED_BRIDGE, *squares, "--data.random_flip", "true"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    teaching(whole, *arguments, "--max_steps", 4).train()
    teaching(parts, *arguments, "--max_steps", 2).train()
    teaching(parts, *arguments, "--max_steps", 4, "--resume_from_checkpoint", "latest").train()
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (whole, parts)]
    assert losses[0] == losses[1]
    first, second = (InterpolantPipeline.from_pretrained(run).transformer.state_dict() for run in (whole, parts))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_a_bridge_leaves_takes_images_and_says_where_they_are_from(tmp_path):
    trainer = teaching(tmp_path, *BRIDGE, *PAIRS, "--max_steps", 1)
    trainer.train()
    pipeline = InterpolantPipeline.from_pretrained(tmp_path)
    assert pipeline.config.image_upsampling == {"factor": 2, "mode": "nearest"}
    small = torch.zeros(2, 1, 4, 4)
    assert len(pipeline([3, 4], image=small, num_inference_steps=2).images) == 2
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["data"]["references"] == "the images after downsample (factor 2)"
    # Inputs, samples and truth below each other.
    picture = Image.open(tmp_path / "samples" / "step_00000001.png")
    assert picture.height > 3 * 48


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (BRIDGE, "starts from reference images: set `data.degradation` or `data.reference_column`"),
        (["--data.reference_name", "x"], "the interpolant 'linear' starts from noise"),
        ([*UNPAIRED_BRIDGE, *PAIRS], "predicts the sample, but prediction_type is 'velocity': set it to sample"),
        (
            ["--interpolant", "bridge", "--prediction_type", "epsilon", *PAIRS],
            "epsilon prediction needs Gaussian noise",
        ),
        ([*BRIDGE, *PAIRS, "--augment_prob", "0.1"], "augmentation would move images and not their references"),
        (
            [*BRIDGE, *PAIRS, "--model.condition_channels", "3"],
            "`model.condition_channels` is 3, but data with pairs gives",
        ),
        (["--model.condition_channels", "1"], "but data without pairs gives 0 channels of a reference"),
        ([*BRIDGE, "--data.degradation", "greyscale"], "images of 1 channel have no colours to lose"),
        (["--interpolant", "bridge", "--data.reference_name", "x"], "infinite velocity at t = 0, .*: set `t_min` away"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        teaching(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()
