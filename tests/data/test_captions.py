"""Images with captions: the captions that there are take the place of classes."""

import datasets
import pytest
import torch
from image_files import png

from si_distill.data import DataConfig, load_training_data
from si_distill.data.latents.config import LatentsConfig
from si_distill.data.latents.dataset import LatentDataset
from si_distill.data.latents.encoding import precompute_latents
from si_distill.errors import InputError

CAPTIONS = ["a cat", "a dog", "a cat", "an owl"]


def written(folder, captions=CAPTIONS, mode="RGB", **columns) -> DataConfig:
    """Numbered images and their captions in a parquet file."""
    kinds = {name: datasets.Sequence(datasets.Value("string")) for name in columns}
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.ClassLabel(2), **kinds}
    rows = {"image": [{"bytes": png(n, mode), "path": None} for n in range(len(captions))], "text": captions}
    rows |= {"kind": [0] * len(captions), **columns}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(folder / "part.parquet"))
    return DataConfig(name="parquet", data_files=str(folder / "part.parquet"), image_size=4, caption_column="text")


def changed(config: DataConfig, **settings) -> DataConfig:
    return DataConfig(**{**vars(config), **settings})


def test_labels_are_the_rows_of_the_distinct_captions(tmp_path):
    data = load_training_data(written(tmp_path))
    assert data.class_names == ["a cat", "a dog", "an owl"]
    assert [data.class_names[label] for label in data.labels] == CAPTIONS
    item = data[3]
    assert item["labels"] == 2
    assert round((item["images"][0, 0, 0].item() + 1) * 127.5) == 3


def test_batches_carry_the_rows(tmp_path):
    data = load_training_data(written(tmp_path))
    batch = next(data.batches(4))
    numbers = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert [data.class_names[row] for row in batch["labels"]] == [CAPTIONS[n] for n in numbers]


def test_captions_past_the_last_image_are_not_counted(tmp_path):
    data = load_training_data(changed(written(tmp_path), max_train_samples=2))
    assert (len(data), data.class_names) == (2, ["a cat", "a dog"])


def test_grey_images_with_captions_are_rgb(tmp_path):
    data = load_training_data(written(tmp_path, mode="L"))
    assert data.channels == 3
    assert data[0]["images"].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(caption_column="txt"), "no column 'txt'; its columns are"),
        (dict(caption_column="kind"), "The captions in 'kind' are ClassLabel"),
        (dict(caption_column="texts"), "one text for each image is needed"),
        (dict(streaming=True), "read by index"),
        (dict(label_column="kind"), "leave one out"),
        (dict(name="digits", data_files=None, image_size=8), "digits have no captions"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(tmp_path, settings, message):
    config = written(tmp_path, texts=[["a", "b"]] * 4)
    with pytest.raises(InputError, match=message):
        load_training_data(changed(config, **settings))


@pytest.mark.parametrize("empty", ["", " ", None])
def test_empty_captions_are_refused_with_their_place(tmp_path, empty):
    with pytest.raises(InputError, match=r"1 of the 3 captions in 'text' .* row 1"):
        load_training_data(written(tmp_path, ["a cat", empty, "a dog"]))


def test_a_cache_of_latents_keeps_the_captions(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "vae")
    config = written(tmp_path)
    made = dict(vae=str(tmp_path / "vae"), output_dir=str(tmp_path / "latents"))
    precompute_latents(LatentsConfig(data=config, **made))
    data = LatentDataset(changed(config, name=made["output_dir"], data_files=None))
    assert [data.class_names[label] for label in data.labels] == CAPTIONS
    assert data[0]["latents_mean"].shape == (2, 2, 4, 4)
    without = dict(vae=made["vae"], output_dir=str(tmp_path / "without"))
    precompute_latents(LatentsConfig(data=changed(config, caption_column=None), **without))
    with pytest.raises(InputError, match="made without captions"):
        LatentDataset(changed(config, name=without["output_dir"], data_files=None))
