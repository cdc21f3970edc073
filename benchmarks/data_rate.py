"""How fast images are streamed, next to how fast the same cores can decode and crop them at all.

    python benchmarks/data_rate.py --data_files 'PATH/*.parquet'

Both are measured in turns in one run. The decoder's processes hold encoded images in memory, decode and crop them, and drop
them. The stream reads, shuffles, decodes, crops and hands batches over as trainers take them: bytes, which become numbers in
[-1, 1] on the device. Processor time says the same where other work disturbs the clock. Without files JPEGs are made.
"""

import io
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import active_children, current_process, get_context
from pathlib import Path

import numpy as np
import torch
from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text
from PIL import Image, ImageFilter

from si_distill.data import DataConfig, load_training_data
from si_distill.data.decoding import decode, to_pixels
from si_distill.settings import at_least, parse_settings, script_main, setting


@dataclass
class DataRateConfig:
    """Settings of the benchmark."""

    data_files: str | None = setting(None, "Parquet files of encoded images, or JPEGs are made.")
    image_size: int = setting(256, "Height and width of the batches.")
    batch_size: int = setting(32, "Images in a batch.")
    workers: int = setting(2, "Processes that decode; the cores that both rates are of.")
    images: int = setting(400, "Images of a measurement.")
    rounds: int = setting(15, "Measurements of each.")
    made: int = setting(256, "JPEGs to make, of ImageNet's usual 500 × 375 pixels.")
    output: str = setting("benchmarks/results", "Folder of data_rate.md and .json.")

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "workers", "images", "rounds", "made"):
            at_least(name, getattr(self, name), 1)


def make_jpegs(folder: Path, count: int, shards: int) -> str:
    """Photograph-like JPEGs (smoothed noise, quality 90) in Parquet files; their glob."""
    import datasets

    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375), 3)
        buffer = io.BytesIO()
        coarse.filter(ImageFilter.GaussianBlur(1)).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    for shard in range(shards):
        table.shard(shards, shard).to_parquet(str(folder / f"{shard}.parquet"))
    return str(folder / "*.parquet")


def cpu_seconds(processes: list) -> float:
    """Processor time that they have used so far, each at the resolution of the system's clock ticks (Linux)."""
    stats = [Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split() for process in processes]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def decode_all(connection, encoded: list[bytes], size: int) -> None:
    """A process that decodes and crops as many images as it is asked for, and answers with its images per second."""
    torch.set_num_threads(1)
    while count := connection.recv():
        started = time.perf_counter()
        for n in range(count):
            to_pixels(decode(encoded[n % len(encoded)]), 3, size)
        connection.send(count / (time.perf_counter() - started))


def measure(config: DataRateConfig, files: str) -> dict[str, dict[str, list[float]]]:
    """Images per second, and milliseconds of processor time for an image, of each round."""
    data = load_training_data(
        DataConfig(name="parquet", data_files=files, label_column="none", streaming=True, image_size=config.image_size),
        readers=config.workers,
    )
    encoded = []
    for chunk in data.source.iter(batch_size=100):
        encoded += [value["bytes"] for value in chunk[data.reader.columns.image]]
    context, decoders, connections = get_context("fork"), [], []
    for number in range(config.workers):
        here, there = context.Pipe()
        own = encoded[number :: config.workers]
        decoders.append(context.Process(target=decode_all, args=(there, own, config.image_size), daemon=True))
        decoders[-1].start()
        connections.append(here)

    def decoder(count: int) -> tuple[float, float]:
        each, before = max(1, count // config.workers), cpu_seconds(decoders)
        for connection in connections:
            connection.send(each)
        rate = sum(connection.recv() for connection in connections)
        return rate, 1e3 * (cpu_seconds(decoders) - before) / (each * config.workers)

    # One stream for all rounds, so that reading blocks of it is part of what is measured.
    batches = data.batches(config.batch_size, num_workers=config.workers, seed=1)
    next(batches)
    readers = [current_process(), *(child for child in active_children() if child not in decoders)]

    def stream(count: int) -> tuple[float, float]:
        for _ in range(3 * config.workers):  # what was read ahead while the others were measured: two batches each
            next(batches)
        steps = config.workers * max(1, count // (config.batch_size * config.workers))
        started, before = time.perf_counter(), cpu_seconds(readers)
        for _ in range(steps):
            next(batches)
        images = steps * config.batch_size
        return images / (time.perf_counter() - started), 1e3 * (cpu_seconds(readers) - before) / images

    decoder(len(encoded))  # every image once: both sides then find the files' pages and their own memory warm
    rounds = [(*decoder(config.images), *stream(config.images)) for _ in range(config.rounds)]
    for connection in connections:
        connection.send(0)
    rate, cost, streamed_rate, streamed_cost = map(list, zip(*rounds, strict=True))
    return {
        "decode and crop alone": {"rate": rate, "cost": cost},
        "streamed batches": {"rate": streamed_rate, "cost": streamed_cost},
        "streamed / alone": {
            "rate": [s / a for a, s in zip(rate, streamed_rate, strict=True)],
            "cost": [s / a for a, s in zip(cost, streamed_cost, strict=True)],
        },
    }


def main(argv: list[str]) -> None:
    config = parse_settings(DataRateConfig, argv, __doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = config.data_files or make_jpegs(Path(folder), config.made, 2 * config.workers)
        measured = measure(config, files)
    facts = hardware(config.workers)
    rows = [
        [name, *(f"{statistics.median(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in (row["rate"], row["cost"]))]
        for name, row in measured.items()
    ]
    source = "the files given" if config.data_files else "JPEGs of 500 × 375 made here"
    pixels = f"{config.image_size} × {config.image_size}"
    text = (
        markdown_table([f"to {pixels}; median (range)", "images per second", "processor ms per image"], rows)
        + f"\n\nBatches of {config.batch_size} from {source}; {config.rounds} rounds of {config.images} images. "
        + hardware_line(facts)
        + "\n"
    )
    write_json(Path(config.output) / "data_rate.json", {"measured": measured, **facts})
    write_text(Path(config.output) / "data_rate.md", text)
    print(text)


if __name__ == "__main__":
    script_main(main)
