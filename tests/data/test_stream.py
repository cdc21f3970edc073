"""Streams: every image once per epoch over all readers, exact resume, no end, corrupt images, what is refused."""

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch
from image_files import CLASSES, SIZE, numbers, png, write_folder, write_parquet, write_tars

from si_distill.data import DataConfig, ImageDataset, ImageStream, load_images, load_training_data
from si_distill.data.decoding import UnreadableImage
from si_distill.errors import InputError, TrainingStopped

COUNT = 53


def config(name="parquet", files=None, **changes) -> DataConfig:
    defaults = dict(streaming=True, image_size=SIZE, shuffle_buffer_size=7)
    return DataConfig(**{**defaults, "name": name, "data_files": files, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The glob of five uneven Parquet files, in row groups of five."""
    return write_parquet(tmp_path_factory.mktemp("parquet"), [20, 3, 1, 12, 17])


def draw(data, batches, batch_size=3, world_size=1, workers=0, seed=5, states=None, start=0):
    """Numbers of the images of each rank, and the ranks' states as a checkpoint holds them."""
    ranks = [data.batches(batch_size, rank, world_size, seed, start, workers) for rank in range(world_size)]
    for rank, state in zip(ranks, states or [], strict=False):
        rank.load_state_dict(json.loads(state))
    found = [[numbers(next(rank)) for _ in range(batches)] for rank in ranks]
    return found, [json.dumps(rank.state_dict()) for rank in ranks]


def read(batches, count):
    return [next(batches) for _ in range(count)]


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


# Order.


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 11])
def test_an_epoch_shows_every_image_once_over_all_readers(files, readers):
    """Batches of one image, so that each reader's epochs can be told apart; with 11 readers by the files' row groups."""
    data = load_training_data(config(files=files), readers)
    for seed in range(2):
        epochs = [[], []]
        for rank in range(readers):
            batches = data.batches(1, rank, readers, seed)
            while (state := batches.state_dict()["places"][0]["epoch"]) < 2:
                image = numbers(next(batches))
                state = batches.state_dict()["places"][0]["epoch"]
                if state < 2:
                    epochs[state] += image
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(COUNT))
        assert epochs[0] != epochs[1]
        assert epochs[0] != list(range(COUNT))


def test_the_order_depends_on_the_seed_and_blocks_are_shuffled(files):
    data = load_training_data(config(files=files))
    first, again, other = (flat(draw(data, 17, seed=seed)[0][0]) for seed in (1, 1, 2))
    assert first == again != other
    steps = [b - a for a, b in itertools.pairwise(first)]
    assert steps.count(1) < len(steps) / 2


def test_workers_read_in_turn_and_together_show_every_image(files):
    data = load_training_data(config(files=files), 2)
    (found,), _ = draw(data, 60, batch_size=1, workers=2)
    halves = [flat(found[worker::2]) for worker in range(2)]
    alone = [flat(draw(data, 30, batch_size=1, world_size=2)[0][worker]) for worker in range(2)]
    assert halves == alone  # two workers of one rank read what two ranks would


@pytest.mark.parametrize(
    ("world_size", "workers", "batch_size", "block"),
    [
        (1, 0, 3, 7),
        (1, 0, 1, 1),
        (1, 0, 8, 1000),
        (2, 0, 3, 7),
        (3, 0, 5, 20),
        (5, 0, 2, 3),
        (1, 2, 3, 7),
        (2, 2, 4, 6),
    ],
)
def test_a_stream_resumes_bit_for_bit_anywhere(files, world_size, workers, batch_size, block):
    data = load_training_data(config(files=files, shuffle_buffer_size=block), world_size * max(1, workers))
    kind = dict(batch_size=batch_size, world_size=world_size, workers=workers)
    length = 30 if workers == 0 else 18
    whole, end = draw(data, length, **kind)
    cuts = range(1, length, 4) if workers == 0 else (1, 4, 11)
    for cut in cuts:
        before, states = draw(data, cut, **kind)
        after, last = draw(data, length - cut, states=states, start=cut, **kind)
        assert [a + b for a, b in zip(before, after, strict=True)] == whole
        assert last == end
        assert all(len(state) < 1000 for state in states)


def test_another_number_of_readers_starts_a_new_order_and_says_so(files, caplog):
    data = load_training_data(config(files=files), 2)
    _, states = draw(data, 4)
    fresh, _ = draw(data, 17, workers=2)
    for state in (states, ["null"]):
        with caplog.at_level(logging.WARNING):
            restarted, _ = draw(data, 17, workers=2, states=state, start=4)
        assert "the data start in a new order" in caplog.text
        assert restarted != fresh
        caplog.clear()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_part_of_the_images_is_the_same_for_any_number_of_readers(files, streaming):
    few = config(files=files, max_train_samples=8, streaming=streaming)
    for readers in (1, 2, 5):
        data = load_training_data(few, readers)
        assert data.count == 8
        found = [set(flat(rank)) for rank in draw(data, 30, world_size=readers)[0]] if streaming else [set(range(8))]
        # Two of each of the first three files and one of the last two; the third has one image only.
        assert set().union(*found) == ({0, 1, 20, 21, 23, 24, 36} if streaming else set(range(8)))


# Kinds of sources.


def everything(data, batches=40):
    return sorted(set(flat(draw(data, batches)[0][0])))


def test_webdataset_is_streamed_with_its_own_columns(tmp_path):
    tars = config("webdataset", write_tars(tmp_path, [9, 2, 6]))
    with pytest.raises(InputError, match=r"plain numbers.*set `data.num_classes`"):
        load_training_data(tars)
    data = load_training_data(tars, readers=3, num_classes=3)
    assert (data.class_names, data.channels, data.count) == (["0", "1", "2"], 3, None)
    assert everything(data) == list(range(17))
    whole, _ = draw(data, 20, world_size=3)
    before, states = draw(data, 7, world_size=3)
    after, _ = draw(data, 13, world_size=3, states=states, start=7)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole


def test_a_folder_of_files_is_listed_and_read_by_index(tmp_path):
    """`datasets` streams a folder as one shard in the order of its classes: with the list, any order is to be had."""
    data = load_training_data(config(write_folder(tmp_path, 20)), readers=4)
    assert isinstance(data, ImageDataset)
    assert (len(data), data.class_names) == (20, CLASSES)
    (first,) = (next(data.batches(20)) for _ in range(1))
    by_index = load_images(config(str(tmp_path), streaming=False))
    found = ((first["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(found) == list(range(20)) != found
    assert first["labels"].tolist() == [number % 3 for number in found]
    assert by_index.class_names == CLASSES
    assert len(load_training_data(config(str(tmp_path), max_train_samples=7))) == 7


def test_parquet_by_its_folder_has_class_names_and_a_stream_no_index(files):
    data = load_training_data(config(os.path.dirname(files)))
    assert isinstance(data, ImageStream)
    assert (data.class_names, data.num_shards) == (CLASSES, 5)
    assert everything(data) == list(range(COUNT))
    with pytest.raises(InputError, match="needed by index here"):
        load_images(config(files=files))
    unlabelled = load_training_data(config(files=files, label_column="none"))
    assert unlabelled.class_names == []
    assert not next(unlabelled.batches(4))["labels"].any()


# Corrupt images.


def test_corrupt_images_are_skipped_counted_once_and_named(tmp_path, caplog):
    broken = (2, 11)
    stream = config(files=write_parquet(tmp_path, [8, 8], corrupt=broken))
    for workers in (0, 2):
        data = load_training_data(stream, max(1, workers))
        batches = data.batches(2, num_workers=workers, seed=3)
        with caplog.at_level(logging.WARNING):
            found = flat(numbers(next(batches)) for _ in range(30))
        assert set(found) == set(range(16)) - set(broken)
        assert batches.counts == {"corrupt_images": 2}
        assert [record.message.count(".png") for record in caplog.records] == [1, 1]
        resumed = data.batches(2, num_workers=workers, seed=3)
        resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        assert resumed.counts == {"corrupt_images": 2}
        caplog.clear()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_images_stop_the_training(tmp_path, streaming, workers):
    files = write_parquet(tmp_path, [20], corrupt=tuple(range(17, 20)))
    data = load_training_data(config(files=files, max_corrupt_images=2, streaming=streaming))
    batches = data.batches(4, num_workers=workers)
    with pytest.raises(TrainingStopped, match=r"3 images of parquet cannot be read .*data.max_corrupt_images` = 2"):
        read(batches, 20)


def test_data_by_index_put_the_next_image_in_place_of_a_corrupt_one(tmp_path):
    files = write_parquet(tmp_path, [10], corrupt=(3, 4, 9))
    data = load_training_data(config(files=files, streaming=False))
    batches = data.batches(10, seed=2)
    images = next(batches)["images"]
    found = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(found) == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]
    assert batches.counts == {"corrupt_images": 3}
    with pytest.raises(InputError, match="Image number 3 of the data set cannot be read"):
        data[3]  # whoever asks for one image by its number is not given another


def test_data_without_a_readable_image_are_refused_at_once(tmp_path):
    files = write_parquet(tmp_path, [4], corrupt=(0, 1, 2, 3))
    for streaming in (True, False):
        with pytest.raises(InputError, match="None of the first images in 'image' can be read"):
            load_training_data(config(files=files, streaming=streaming))


def write_rows(folder, images, labels=None) -> str:
    """A parquet file of rows whose images are bytes or missing."""
    kind = datasets.ClassLabel(names=CLASSES) if labels is None else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = [None if image is None else {"bytes": image, "path": None} for image in images]
    labels = [n % len(CLASSES) for n in range(len(rows))] if labels is None else labels
    table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    table.to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("unreadable", [None, b"", b"no image"])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_missing_or_alike_count_one_by_one(tmp_path, unreadable, workers):
    files = write_rows(tmp_path, [png(n) if n % 2 == 0 else unreadable for n in range(20)])
    batches = load_training_data(config(files=files, max_corrupt_images=10)).batches(5, num_workers=workers)
    found = flat(numbers(next(batches)) for _ in range(8))  # four epochs
    assert set(found) == set(range(0, 20, 2))
    assert batches.counts == {"corrupt_images": 10}
    batches = load_training_data(config(files=files, max_corrupt_images=9)).batches(5, num_workers=workers)
    with pytest.raises(TrainingStopped, match="10 images of parquet cannot be read"):
        read(batches, 8)


def test_a_place_counts_once_after_a_resume(tmp_path):
    files = write_rows(tmp_path, [png(n) if n % 2 == 0 else None for n in range(40)])
    data = load_training_data(config(files=files, shuffle_buffer_size=5))
    batches = data.batches(4)
    for _ in range(30):
        resumed = data.batches(4)
        resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        assert numbers(next(resumed)) == numbers(next(batches))
        batches = resumed
    assert batches.counts == {"corrupt_images": 20}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_any_image_after_the_first_ones_stop(tmp_path, streaming, workers):
    """Fewer than the limit: reading on would never end."""
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "a", [png(n) for n in range(4)])
    data = load_training_data(config(files=str(tmp_path / "a" / "*.parquet"), streaming=streaming))
    write_rows(tmp_path / "a", [None] * 4)
    if not streaming:
        data.read = load_images_read_of_nothing
    with pytest.raises(TrainingStopped, match=r"no image that can be read|No image of parquet can be read"):
        read(data.batches(2, num_workers=workers), 20)


def load_images_read_of_nothing(index):
    raise UnreadableImage(f"Image number {index} of the data set cannot be read.")


# What is refused.


def test_what_a_stream_cannot_be_is_said_before_it_starts(files, tmp_path):
    numbered = write_parquet(tmp_path, [4], names=False)
    for changes, readers, words in (
        (dict(), 14, r"has 13 shard\(s\).* but 14 processes would read it"),
        (dict(image_column="photo"), 1, r"no column 'photo'; its columns are \['image', 'label'\]"),
        (dict(data_files=numbered), 1, "No label column among"),
        (dict(data_files=numbered, label_column="label"), 1, "set `data.num_classes`"),
        (dict(data_files="nowhere-*.parquet"), 1, "Cannot load the data set 'parquet'"),
        (dict(split="test"), 1, "Cannot load the data set 'parquet'.*split='test'"),
        (dict(label_column="image"), 1, "classes are ClassLabel or integers"),
        (dict(image_column="label"), 1, "The column 'label' holds ClassLabel.*, which is not read as images"),
    ):
        with pytest.raises(InputError, match=words):
            load_training_data(config(**{"files": files, **changes}) if "data_files" not in changes else config(
                files=changes["data_files"], **{k: v for k, v in changes.items() if k != "data_files"}
            ), readers)  # fmt: skip


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("name", "content"), [("parquet", b"no parquet" * 9), ("webdataset", b"no tar" * 200), ("webdataset", b"")]
)
def test_files_of_another_kind_are_named(tmp_path, name, content, streaming):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(InputError, match=f"Cannot load the data set '{name}' .*{tmp_path}"):
        load_training_data(config(name, str(tmp_path / "data"), streaming=streaming))


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_outside_the_classes_stop_with_a_sentence(tmp_path, workers):
    stream = config(files=write_parquet(tmp_path, [12], names=False), label_column="label", num_classes=2)
    batches = load_training_data(stream).batches(12, num_workers=workers)
    with pytest.raises(TrainingStopped, match=r"has the label 2, but there are 2 classes, 0 to 1.*resume"):
        next(batches)
    with pytest.raises(InputError, match="has the label 2, but there are 2 classes, 0 to 1"):
        load_images(config(files=stream.data_files, label_column="label", num_classes=2, streaming=False))


def test_labels_that_are_missing_are_a_sentence_by_index_and_as_a_stream(tmp_path):
    files = write_rows(tmp_path, [png(n) for n in range(4)], [0, 1, None, 1])
    said = "An image of 'parquet' has no label, but there are 2 classes, 0 to 1"
    with pytest.raises(InputError, match=said):
        load_images(config(files=files, label_column="label", streaming=False))
    stream = load_training_data(config(files=files, label_column="label", num_classes=2))
    with pytest.raises(TrainingStopped, match=said):
        next(stream.batches(4))


def test_classes_without_images_are_named_with_what_to_do(tmp_path, caplog):
    files = write_rows(tmp_path, [png(n) for n in range(3)], [1, 2, 3])
    with caplog.at_level(logging.WARNING):
        data = load_images(config(files=files, label_column="label", streaming=False))
    assert data.class_names == ["0", "1", "2", "3"]
    assert "1 of the 4 classes of parquet have no images (0): the labels go from 1 to 3" in caplog.text
    assert "Number the labels from 0" in caplog.text
    files = write_rows(tmp_path, [png(n) for n in range(3)], [0, 1, 2**40])
    with pytest.raises(InputError, match=r"reach 1,099,511,627,776: classes are numbered 0 … K − 1"):
        load_images(config(files=files, label_column="label", streaming=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_break_off_stop_with_a_sentence(tmp_path, workers):
    data = load_training_data(config(files=write_parquet(tmp_path, [12, 12])))
    (tmp_path / "part-001.parquet").unlink()
    batches = data.batches(5, num_workers=workers)
    with pytest.raises(TrainingStopped, match=r"Reading 'parquet' broke off: FileNotFoundError.*resume") as stopped:
        read(batches, 6)
    assert "Traceback" not in str(stopped.value)


def test_a_reader_without_images_is_named_and_does_not_spin(tmp_path):
    data = load_training_data(config("webdataset", write_tars(tmp_path, [4, 4]), num_classes=3), 2)
    write_tars(tmp_path, [4, 0])
    with pytest.raises(TrainingStopped, match="was given hold no images"):
        draw(data, 3, world_size=2)


class Gated(BaseHTTPRequestHandler):
    """The Hub's answer to whoever has not accepted the terms of a gated data set."""

    def do_HEAD(self):
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this dataset is restricted")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_gated_data_and_an_unreachable_hub_are_explained():
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    code = (
        "from si_distill.data import DataConfig, load_training_data\n"
        "load_training_data(DataConfig(name='ILSVRC/imagenet-1k', streaming=True, image_size=256))"
    )
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HUB_OFFLINE": "0"}
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    hub.shutdown()
    message = failed.stderr.split("InputError: ")[-1]
    assert "gated dataset on the Hub" in message
    assert "accept the terms on its page, https://huggingface.co/datasets/ILSVRC/imagenet-1k" in message
    assert "HF_TOKEN" in message
    with pytest.raises(InputError, match=r"The Hub cannot be reached from here.*(?s:.*)HF_TOKEN"):
        load_training_data(config("ILSVRC/imagenet-1k"))


# Pairs.


def test_pairs_are_streamed_together(tmp_path):
    import datasets

    features = datasets.Features({"photo": datasets.Image(), "sketch": datasets.Image()})
    rows = {"photo": [{"bytes": png(n), "path": None} for n in range(9)]}
    rows["sketch"] = [{"bytes": png(100 + n), "path": None} for n in range(9)]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "pairs.parquet"))
    pairs = config(files=str(tmp_path / "*.parquet"), label_column="none", reference_column="sketch")
    batch = next(load_training_data(pairs).batches(9))
    assert batch["images"][:, 0, 0, 0].sort().values.tolist() == list(range(9))
    assert torch.equal(batch["reference"][:, 0], batch["images"][:, 0] + 100)
