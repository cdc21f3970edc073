"""Images from scikit-learn and from files that `datasets` reads, made here."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from si_distill.data import DataConfig, load_images
from si_distill.errors import InputError


def encoded(array: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(folder, images, labels, label_feature=None, **columns):
    """A parquet file with encoded images."""
    features = {"photo": datasets.Image(), "kind": label_feature or datasets.ClassLabel(names=["cat", "dog"])}
    features |= {name: datasets.Value("int64") for name in columns}
    rows = {"photo": [{"bytes": image, "path": None} for image in images], "kind": labels, **columns}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(folder / "part.parquet"))
    return DataConfig(name="parquet", data_files=str(folder / "*.parquet"), image_size=4)


def random_image(seed: int, height: int = 6, width: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, raw = load_images(DataConfig()), load_digits()
    assert (len(data), data.channels, data.size, data.class_names[7]) == (1797, 1, 8, "7")
    image, label = data[5]["images"], data[5]["labels"]
    assert label == raw.target[5]
    # 17 grey levels in a uint8: half a level of 255 at most.
    np.testing.assert_allclose(image[0].numpy(), raw.images[5] / 8 - 1, atol=0.5 / 127.5)
    assert len(load_images(DataConfig(max_train_samples=30))) == 30


def test_columns_and_class_names_are_found_by_their_types(tmp_path):
    data = load_images(parquet(tmp_path, [encoded(random_image(n)) for n in range(3)], [0, 1, 0], extra=[5, 6, 7]))
    assert (len(data), data.channels, data.class_names) == (3, 3, ["cat", "dog"])
    image, label = data[1]["images"], data[1]["labels"]
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    assert label == 1


def test_images_are_cut_from_the_centre(tmp_path):
    array = random_image(0, 4, 12)
    data = load_images(parquet(tmp_path, [encoded(array)] * 2, [0, 1]))
    pixels = data.read(0)
    assert torch.equal(pixels, torch.from_numpy(array[:, 4:8]).permute(2, 0, 1))


def test_grey_images_have_one_channel_and_mixed_files_are_converted(tmp_path):
    grey = load_images(parquet(tmp_path, [encoded(random_image(0), "L")] * 2, [0, 1]))
    assert grey.channels == 1
    assert grey[0]["images"].shape == (1, 4, 4)
    (tmp_path / "mixed").mkdir()
    colour = [encoded(random_image(0)), encoded(random_image(1), "L"), encoded(random_image(2), "RGBA")]
    mixed = load_images(parquet(tmp_path / "mixed", colour, [0, 1, 0]))
    assert [mixed[n]["images"].shape[0] for n in range(3)] == [3, 3, 3]


def test_labels_without_names_are_numbers(tmp_path):
    config = parquet(tmp_path, [encoded(random_image(n)) for n in range(3)], [0, 2, 1], datasets.Value("int64"))
    with pytest.raises(InputError, match=r"No label column among .*set `data.label_column`"):
        load_images(config)
    config.label_column = "kind"
    assert load_images(config).class_names == ["0", "1", "2"]


def test_images_without_labels_are_asked_for_by_name(tmp_path):
    config = parquet(tmp_path, [encoded(random_image(n)) for n in range(2)], [0, 1])
    labelled, config.label_column = load_images(config), "none"
    unlabelled = load_images(config)
    assert unlabelled.class_names == []
    assert [unlabelled[n]["labels"] for n in range(2)] == [0, 0]
    assert torch.equal(unlabelled[1]["images"], labelled[1]["images"])


def test_a_corrupt_image_is_named_by_its_number(tmp_path):
    data = load_images(parquet(tmp_path, [encoded(random_image(0)), encoded(random_image(1))[:60]], [0, 1]))
    assert data[0]["labels"] == 0
    with pytest.raises(InputError, match=r"Image number 1 of the data set cannot be read"):
        data[1]


def test_data_that_cannot_be_loaded_are_named(tmp_path):
    config = parquet(tmp_path, [encoded(random_image(0))] * 2, [0, 1])
    for change, words in (
        (dict(image_column="image"), "no column 'image'; its columns are .*'photo', 'kind'"),
        (dict(split="test"), "split='test'"),
        (dict(name="pandas"), "a format of pickles or queries, which run what is in them"),
        (dict(data_files=str(tmp_path / "none-*.parquet")), "Cannot load the data set 'parquet'"),
        (dict(name="digits"), r"8×8 images; `data.image_size` is 4"),
    ):
        with pytest.raises(InputError, match=words):
            load_images(DataConfig(**{**vars(config), **change}))


def test_a_struct_of_bytes_is_a_column_of_images(tmp_path):
    """What `datasets` stores, written by somebody else: without its description of the features."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def encoded(value):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), value).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([encoded(20 * n) for n in range(4)], kind), "label": pa.array([0, 1, 0, 1])})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = load_images(DataConfig(name="parquet", data_files=str(tmp_path / "a.parquet"), label_column="label"))
    assert data.labels == [0, 1, 0, 1]
    assert torch.equal(data.read(3), torch.full((1, 8, 8), 60, dtype=torch.uint8))
