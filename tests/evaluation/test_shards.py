"""Features in shards: the same whatever the batch, nothing twice, damaged ones again; and what images are read."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers import tiny_sit
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.evaluation.features import load_extractor
from si_distill.evaluation.generators import balanced_labels
from si_distill.evaluation.neighbours import nearest
from si_distill.evaluation.samples import FileSource, PipelineSource
from si_distill.evaluation.shards import SHARD, Shards


@pytest.fixture
def student():
    pipeline = OneStepInterpolantPipeline(tiny_sit(num_classes=10), StochasticInterpolantScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_images(one: torch.Tensor, other: torch.Tensor) -> None:
    # Matrix products of another batch may round a value to the neighbouring level.
    difference = (one.int() - other.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3


def images_and_evaluations(pipeline, call, labels, seed, size) -> tuple[torch.Tensor, float]:
    """One image for each label, read in batches of `size`, and how often the network was evaluated for each."""
    source = PipelineSource(pipeline, call, labels, seed)
    batches = [source.read(range(len(labels))[start : start + size]) for start in range(0, len(labels), size)]
    return torch.cat([batch.images for batch in batches]), sum(batch.rows for batch in batches) / len(labels)


def test_images_do_not_depend_on_the_batch_size(student):
    labels = [n % 10 for n in range(23)]
    call = partial(student, output_type="pt")
    made = {size: images_and_evaluations(student, call, labels, 5, size)[0] for size in (1, 7, 64)}
    for size in (1, 7):
        assert_same_images(made[size], made[64])
    other_seed, _ = images_and_evaluations(student, call, labels, 6, 64)
    assert (other_seed != made[64]).any(dim=(1, 2, 3)).all()


def test_evaluations_are_those_of_the_network(student):
    teacher = InterpolantPipeline(**student.components)
    teacher.set_progress_bar_config(disable=True)
    labels = [0, 1, 2]
    assert images_and_evaluations(student, partial(student, output_type="pt"), labels, 0, 2)[1] == 1
    for arguments, expected in (
        (dict(num_inference_steps=4, solver="euler"), 4),
        (dict(num_inference_steps=4, solver="heun"), 7),
        (dict(num_inference_steps=4, solver="euler", guidance_scale=2.0), 8),  # conditional and unconditional
    ):
        call = partial(teacher, output_type="pt", **arguments)
        assert images_and_evaluations(teacher, call, labels, 0, 2)[1] == expected


def test_only_missing_and_damaged_shards_are_made_again(student, tmp_path):
    labels = [n % 10 for n in range(2 * SHARD + 3)]
    state, extractor = PartialState(), load_extractor("pixels", None)
    source = PipelineSource(student, partial(student, output_type="pt"), labels, 0)
    read, indices_read = source.read, []
    source.read = lambda indices: indices_read.append(indices) or read(indices)

    shards = Shards(tmp_path, source, extractor)
    shards.make(state, 300, "")
    assert [(r.start, r.stop) for r in indices_read] == [(0, 300), (300, 512), (512, 812), (812, 1024), (1024, 1027)]
    first = shards.collect()
    assert first.features.shape == (len(labels), 64)
    assert (first.labels, first.rows) == (labels, len(labels))

    os.truncate(shards.path(1), 1000)
    shards.path(2).unlink()
    indices_read.clear()
    again = Shards(tmp_path, source, extractor)
    again.make(state, 300, "")
    assert [(r.start, r.stop) for r in indices_read] == [(512, 812), (812, 1024), (1024, 1027)]
    assert again.collect().features.equal(first.features)

    # Other weights, another seed or another number of steps have shards of their own.
    folders = {shards.folder}
    with torch.no_grad():
        next(student.transformer.parameters()).add_(1)
    folders.add(Shards(tmp_path, source, extractor).folder)
    folders.add(Shards(tmp_path, PipelineSource(student, source.call, labels, 1), extractor).folder)
    more_steps = PipelineSource(student, source.call, labels, 1, settings={"num_inference_steps": 2})
    folders.add(Shards(tmp_path, more_steps, extractor).folder)
    assert len(folders) == 4


def test_images_go_to_png_files_and_to_the_npz_that_adms_evaluator_reads(student, tmp_path):
    labels = [n % 10 for n in range(SHARD + 2)]
    source = PipelineSource(student, partial(student, output_type="pt"), labels, 0)
    expected = source.read(range(len(labels))).images
    shards = Shards(tmp_path / "features", source, load_extractor("pixels", None), None, True, tmp_path / "pictures")
    shards.make(PartialState(), 256, "")
    shards.write_npz(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        images, kept_labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (len(labels), 8, 8, 3)
    assert_same_images(torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2), expected)
    assert (images == images[..., :1]).all()
    assert kept_labels.tolist() == labels

    for source in (FileSource(str(tmp_path / "samples.npz"), 1), FileSource(str(tmp_path / "pictures"), 1)):
        assert len(source) == len(labels)
        assert_same_images(source.read([0, 5, SHARD + 1]).images, expected[[0, 5, SHARD + 1]])
    # A picture that was deleted is made again.
    (tmp_path / "pictures" / "000513.png").unlink()
    shards.make(PartialState(), 256, "")
    assert (tmp_path / "pictures" / "000513.png").exists()


def test_files_that_hold_no_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for size in (4, 5):
        Image.new("L", (size, size)).save(mixed / f"{size}.png")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    for name, words in (
        ("nowhere", "neither a folder of images nor an .npz"),
        ("empty", "holds no images"),
        ("floats.npz", r"arr_0 of float64 \(2, 4, 4, 3\)"),
        ("broken.npz", "Cannot read samples"),
        ("bad", "a.png cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            FileSource(str(tmp_path / name), 3)
    with pytest.raises(InputError, match=r"differ in size: 4.png \(4, 4\), 5.png \(5, 5\)"):
        FileSource(str(mixed), 1).read([0, 1])


def test_classes_are_balanced_as_in_the_data_or_uniformly():
    training = [0] * 50 + [1] * 30 + [2] * 20
    assert balanced_labels(200, 3, training) == training * 2
    part = balanced_labels(130, 3, training)
    assert part[:100] == training
    assert len(set(part[100:])) == 3  # not the first thirty, which are all of class 0
    assert balanced_labels(7, 3, None) == [0, 1, 2, 0, 1, 2, 0]


def test_nearest_real_images_are_exact_and_copies_are_at_zero():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 5, generator=generator) + 1000  # far from zero, where expanded squares would be noise
    made = torch.cat([real[[7]], torch.randn(9, 5, generator=generator) + 1000])
    found = nearest(made, real, 3)
    distances = (made[:, None] - real[None]).double().square().sum(2).sqrt()
    expected = distances.sort(1)
    assert found.indices.equal(expected.indices[:, :3])
    assert found.distances[0, 0] == 0
    torch.testing.assert_close(found.distances.double(), expected.values[:, :3], rtol=1e-5, atol=1e-5)
    among = nearest(real, real, 1, leave_out_self=True)
    assert (among.indices[:, 0] != torch.arange(40)).all()
