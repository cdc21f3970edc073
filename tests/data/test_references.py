"""References of a batch: pairs from columns, degradations, unpaired data sets, minibatch optimal transport."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from test_sources import encoded, random_image

from si_distill.data import DataConfig, load_images, load_training_data
from si_distill.data.references import optimal_assignment, reference_source
from si_distill.errors import InputError
from si_distill.sample_noise import SampleNoise
from si_distill.settings import settings_from_dict


def pairs(folder, images, references) -> DataConfig:
    """A parquet file of encoded pairs."""
    features = datasets.Features({"photo": datasets.Image(), "sketch": datasets.Image()})
    rows = {
        name: [value and {"bytes": value, "path": None} for value in column]
        for name, column in (("photo", images), ("sketch", references))
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "pairs.parquet"))
    return DataConfig(
        name="parquet",
        data_files=str(folder / "*.parquet"),
        image_size=4,
        label_column="none",
        reference_column="sketch",
    )


def test_a_pair_comes_from_two_columns_of_one_row(tmp_path):
    arrays = [random_image(n) for n in range(6)]
    data = load_images(pairs(tmp_path, map(encoded, arrays[:3]), map(encoded, arrays[3:])))
    swapped = pairs(tmp_path, map(encoded, arrays[3:]), map(encoded, arrays[:3]))
    swapped = load_images(swapped)
    for n in range(3):
        assert torch.equal(data[n]["reference"], swapped[n]["images"])
        assert torch.equal(data[n]["images"], swapped[n]["reference"])
    batch = next(data.batches(2, seed=1))
    whole = torch.stack([data[n]["images"] for n in range(3)])
    found = (batch["images"][:, None] == whole).all((2, 3, 4)).float().argmax(1)
    assert torch.equal(batch["reference"], torch.stack([data[int(n)]["reference"] for n in found]))


def test_pairs_that_do_not_fit_are_named(tmp_path):
    wide, high = encoded(random_image(0)), encoded(random_image(1, 10, 6))
    for references, words in (
        ([wide, high], r"Image number 1 of .* it has 10×6 pixels and its reference 6×10: the two of a pair"),
        ([wide, None], "Image number 1 of .* its reference: it is missing"),
        ([wide, wide[:60]], "Image number 1 of .* its reference: OSError"),
        ([encoded(random_image(2), "L")] * 2, "have 1 channel and the images in 'photo' 3: a bridge needs the same"),
    ):
        config = pairs(tmp_path, [wide, wide], references)
        with pytest.raises(InputError, match=words):
            load_images(config)[1]
    config.reference_column = "drawing"
    with pytest.raises(InputError, match=r"no column 'drawing'; its columns are \['photo', 'sketch'\]"):
        load_images(config)
    with pytest.raises(InputError, match="The digits have no references of their own"):
        load_images(DataConfig(reference_column="sketch"))


def test_small_references_of_the_same_shape_are_enlarged(tmp_path):
    config = pairs(tmp_path, [encoded(random_image(0, 12, 12))], [encoded(random_image(1, 6, 6))])
    assert load_images(config)[0]["reference"].shape == (3, 4, 4)


def test_settings_that_contradict_each_other_are_refused():
    for values, words in (
        (dict(degradation="blur", reference_column="x"), "`data.degradation` and `data.reference_column` are both set"),
        (dict(degradation="blur", reference_name="x"), "`data.degradation` and `data.reference_name` are both set"),
        (dict(degradation_kwargs={"sigma": 1}), "no `data.degradation`: name it"),
        (dict(coupling="optimal_transport"), "`data.coupling` is for unpaired references"),
        (dict(reference_files="x"), "`data.reference_files` is for unpaired references"),
        (dict(coupling="sinkhorn", reference_name="x"), "choose one of: independent, optimal_transport"),
        (dict(degradation="noise"), "choose one of: downsample, inpaint"),
    ):
        with pytest.raises(InputError, match=words):
            settings_from_dict(DataConfig, values)


def test_a_part_of_the_digits_is_held_out():
    train, held_out, whole = (load_images(DataConfig(split=split)) for split in ("train[:80%]", "train[80%:]", "train"))
    assert len(train) + len(held_out) == len(whole) == 1797
    assert torch.equal(torch.cat([train.read_all()[0], held_out.read_all()[0]]), whole.read_all()[0])
    assert train.labels + held_out.labels == whole.labels
    assert train[7]["labels"] == whole[7]["labels"]
    for split in ("test", "train[:x]", "train[:10%]+train[90%:]"):
        with pytest.raises(InputError, match="The digits have the split `train`, and parts of it"):
            load_images(DataConfig(split=split))


def test_degraded_references_belong_to_the_sample_and_the_step():
    config = DataConfig(degradation="inpaint", degradation_kwargs={"mask": "random"})
    source, noise = reference_source(config), SampleNoise(3)
    batch = {"images": torch.ones(6, 1, 8, 8), "labels": torch.zeros(6)}
    whole = source(batch, noise, 5, indices=range(6))["reference"]
    half = source({"images": batch["images"][:3]}, noise, 5, indices=range(3, 6))["reference"]
    assert torch.equal(half, whole[3:])
    assert not torch.equal(source(batch, noise, 6, indices=range(6))["reference"], whole)


def test_unpaired_data_are_read_in_orders_of_their_own_and_resumed(tmp_path):
    features = datasets.Features({"photo": datasets.Image()})
    for name, first in (("a", 0), ("b", 50)):
        images = [{"bytes": encoded(np.full((4, 4, 3), first + n, np.uint8)), "path": None} for n in range(8)]
        datasets.Dataset.from_dict({"photo": images}, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    config = DataConfig(
        name="parquet", data_files=str(tmp_path / "a.parquet"), image_size=4, label_column="none",
        reference_name="parquet", reference_files=str(tmp_path / "b.parquet"),
    )  # fmt: skip
    data = load_training_data(config)

    def levels_of(images):
        return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()

    levels = []
    batches = data.batches(4, seed=7)
    for _ in range(4):
        batch = next(batches)
        levels.append([levels_of(batch[name]) for name in ("images", "reference")])
    images, references = ([value for level in levels for value in level[side]] for side in range(2))
    for epoch in range(2):
        assert sorted(images[epoch * 8 : epoch * 8 + 8]) == list(range(8))
        assert sorted(references[epoch * 8 : epoch * 8 + 8]) == list(range(50, 58))
    assert len({b - a for a, b in zip(images, references, strict=True)}) > 4  # no fixed partner
    later = data.batches(4, seed=7, start=2)
    later.load_state_dict(batches.state_dict())
    assert levels_of(next(later)["reference"]) == levels[2][1]


def test_two_data_sets_of_other_channels_are_refused(tmp_path):
    features = datasets.Features({"photo": datasets.Image()})
    rows = {"photo": [{"bytes": encoded(random_image(0)), "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rgb.parquet"))
    config = DataConfig(reference_name="parquet", reference_files=str(tmp_path / "rgb.parquet"))
    with pytest.raises(
        InputError, match=r"The references \(parquet\) have 3 channels and the images \(sklearn-digits\) 1"
    ):
        load_training_data(config)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_transport_finds_the_least_cost_of_all_pairings(count):
    generator = torch.Generator().manual_seed(count)
    images, references = (torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    order = optimal_assignment(images, references)
    assert sorted(order.tolist()) == list(range(count))

    def cost(order):
        return float((images - references[list(order)]).square().sum())

    assert cost(order.tolist()) == pytest.approx(min(cost(p) for p in itertools.permutations(range(count))))


def test_transport_rearranges_references_only():
    source = reference_source(DataConfig(reference_name="other", coupling="optimal_transport"))
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(16, 1, 4, 4, generator=generator) for name in ("images", "reference")}
    batch["labels"] = torch.arange(16)
    done = source(batch, SampleNoise(0), 0, indices=range(16))
    assert torch.equal(done["images"], batch["images"])
    assert torch.equal(done["labels"], batch["labels"])
    assert torch.equal(done["reference"].flatten(1).sort(0).values, batch["reference"].flatten(1).sort(0).values)
    before, after = ((b["images"] - b["reference"]).square().sum() for b in (batch, done))
    assert after < before
