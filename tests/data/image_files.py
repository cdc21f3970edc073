"""Small files of images in the formats that `datasets` reads; every image says its number in its pixels."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

SIZE = 4
CLASSES = ["cat", "dog", "owl"]


def png(number: int, mode: str = "RGB") -> bytes:
    """A square of the colour (number, 0, 255 − number)."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = number, 255 - number
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    """The numbers of the images in a batch of levels; checks that each has the label that belongs to it."""
    found = batch["images"][:, 0, 0, 0].tolist()
    assert batch["images"].dtype == torch.uint8
    assert batch["labels"].tolist() == [number % len(CLASSES) for number in found]
    return found


def write_parquet(
    folder: Path, sizes: list[int], row_group_size: int = 5, corrupt: tuple[int, ...] = (), names: bool = True
) -> str:
    """Parquet files with so many images each, numbered throughout; the glob that finds them."""
    kind = datasets.ClassLabel(names=CLASSES) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    first = 0
    for part, count in enumerate(sizes):
        images = [
            {"bytes": png(n)[:50] if n in corrupt else png(n), "path": f"{n}.png"} for n in range(first, first + count)
        ]
        labels = [n % len(CLASSES) for n in range(first, first + count)]
        table = pa.table({"image": images, "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, folder / f"part-{part:03d}.parquet", row_group_size=row_group_size)
        first += count
    return str(folder / "*.parquet")


def write_tars(folder: Path, sizes: list[int]) -> str:
    """A WebDataset: tar files with N.png and N.cls; the glob that finds them."""
    first = 0
    for part, count in enumerate(sizes):
        with tarfile.open(folder / f"part-{part:03d}.tar", "w") as tar:
            for n in range(first, first + count):
                for suffix, content in (("png", png(n)), ("cls", str(n % len(CLASSES)).encode())):
                    entry = tarfile.TarInfo(f"{n:05d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        first += count
    return str(folder / "*.tar")


def write_folder(folder: Path, count: int) -> str:
    """An image folder with a sub-folder for each class."""
    for n in range(count):
        path = folder / CLASSES[n % len(CLASSES)] / f"{n:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    return str(folder)
