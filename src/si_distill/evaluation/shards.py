"""Features of many images in shards on disk: made by any number of processes, and never twice.

A shard holds the features of `SHARD` consecutive images; which images these are depends on nothing but its number, so that
a run that was killed goes on with another batch size or number of processes and ends with the same figures. Images stay on
disk only when asked for.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from .. import fingerprints
from ..errors import InputError
from ..files import whole_file, write_text
from ..reading import read_json
from .classifier import DigitsClassifier
from .features import Extractor
from .npz import REAL, open_npz
from .prompts import Prompts
from .samples import Source
from .scores import Scorer

#: Images in a shard; a batch never crosses its border.
SHARD = 512
MANIFEST = "manifest.json"
#: What a shard may hold: dimensions and types.
ARRAYS = {
    "features": (2, *REAL),
    "logits": (2, np.floating),
    "labels": (1, np.integer),
    "predicted": (1, np.integer),
    "images": (4, np.uint8),
    "rows": (0, np.integer),
    "seconds": (0, np.floating),
}
#: Figures of single images, of scorers too: dimensions and types.
FIGURE = (1, np.floating)
#: Those next to their inputs' truth.
COMPARED = ("psnr", "spread")


@dataclass
class Collected:
    """Features of all images of one source.

    Args:
        features: (N, D), as the extractor gives them.
        logits: (N, K) float32, or None.
        labels: N classes, or None.
        predicted: N classes as the classifier sees them, or None.
        rows: rows that went through the network.
        seconds: that generation took, added up over the processes.
        compared: figures of each image, (N,) by name: of a pipeline that takes images (see `PipelineSource`), of scorers.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    labels: list[int] | None
    predicted: np.ndarray | None
    rows: int
    seconds: float
    compared: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Shards:
    """The shards of one source and extractor.

    Args:
        folder: where the shards of all sources of an evaluation lie, on a file system that all processes share; these lie
            in a folder of their own in it.
        source: the images.
        extractor: of the features.
        classifier: names the class of each of some uint8 images, for label accuracy, if there is one.
        keep_images: whether the shards hold the images too, for `write_npz`.
        pictures: a folder for the images as PNG files, if they are wanted.
        prompts: of the images, if they have any.
        scorers: of the images and their prompts, by the names of metrics.
    """

    folder: Path
    source: Source
    extractor: Extractor
    classifier: DigitsClassifier | None = None
    keep_images: bool = False
    pictures: Path | None = None
    prompts: Prompts | None = None
    scorers: dict[str, Scorer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = {"source": self.source.identity, **self.extractor.identity}
        if self.classifier is not None:
            self.identity["classifier"] = self.classifier.name
        if self.prompts is not None:
            self.identity["prompts"] = self.prompts.identity
            self.identity["scorers"] = {name: scorer.identity for name, scorer in self.scorers.items()}
        self.folder = self.folder / fingerprints.of_values(self.identity)

    def __len__(self) -> int:
        return -(-len(self.source) // SHARD)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:06d}.npz"

    def indices(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, len(self.source)))

    def make(self, state: PartialState, batch_size: int, description: str) -> None:
        """Makes the shards that are missing, each process its share; collective.

        Raises:
            InputError: when the folder cannot be written, or processes do not share it.
        """
        try:
            if state.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / MANIFEST, json.dumps(self.identity, indent=1))
            state.wait_for_everyone()
            missing = [shard for shard in range(len(self)) if not self._is_made(shard)]
            state.wait_for_everyone()  # nobody writes before everybody has looked
            mine = missing[state.process_index :: state.num_processes]
            done = len(self.source) - sum(len(self.indices(shard)) for shard in missing)
            share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
            with tqdm(
                total=sum(len(self.indices(shard)) for shard in mine),
                desc=f"{description}{share}" + (f", {done} made before" if done else ""),
                unit="img",
                disable=not state.is_main_process,
                mininterval=0.5,
            ) as bar:
                for shard in mine:
                    self._make(shard, batch_size, bar)
        except OSError as error:
            raise InputError(f"Cannot write features to {self.folder}: {error}. Give another `output`.") from error
        state.wait_for_everyone()
        if not all(self.path(shard).exists() for shard in range(len(self))):
            raise InputError(
                f"Shards are missing in {self.folder}: all processes must write to one shared file system."
            )

    def _make(self, shard: int, batch_size: int, bar: tqdm) -> None:
        indices = self.indices(shard)
        parts: dict[str, list[np.ndarray]] = {}
        rows, seconds = 0, 0.0
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            batch = self.source.read(chosen)
            features, logits = self.extractor(batch.images)
            found = {
                "features": features,
                "logits": logits,
                "labels": None if batch.labels is None else np.array(batch.labels, dtype=np.int64),
                "predicted": None if self.classifier is None else self.classifier.predict(batch.images),
                "images": batch.images if self.keep_images else None,
                **batch.compared,
                **{name: scorer(batch.images, self.prompts.of(chosen)) for name, scorer in self.scorers.items()},
            }
            for name, values in found.items():
                if values is not None:
                    parts.setdefault(name, []).append(np.asarray(values))
            if self.pictures is not None:
                self._write_pictures(indices[start], batch.images)
            rows += batch.rows
            seconds += batch.seconds
            bar.update(len(batch.images))
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        with whole_file(self.path(shard)) as file:
            np.savez(file, rows=np.int64(rows), seconds=np.float64(seconds), **arrays)

    def _is_made(self, shard: int) -> bool:
        """Whether a shard is whole and has what is wanted now."""
        indices = self.indices(shard)
        if self.pictures is not None and not all(self._picture(i).exists() for i in indices):
            return False
        try:
            with open_npz(self.path(shard), "features") as file:
                if "images" not in file.names and self.keep_images:
                    return False
                wanted = None if self.source.labels is None else [self.source.labels[i] for i in indices]
                return len(file.read("features", *ARRAYS["features"])) == len(indices) and (
                    wanted is None or file.read("labels", *ARRAYS["labels"]).tolist() == wanted
                )
        except InputError:
            return False

    def _picture(self, index: int) -> Path:
        return self.pictures / f"{index:06d}.png"

    def _write_pictures(self, first: int, images: torch.Tensor) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        for offset, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            # Unsynced, which takes as long as sampling them: the shard that follows says that they are made.
            with whole_file(self._picture(first + offset), sync=False) as file:
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")

    def arrays(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """The named arrays of one shard after the other; a shard lacks those that nobody wrote."""
        for shard in range(len(self)):
            with open_npz(self.path(shard), "features") as file:
                found = {name: file.read(name, *ARRAYS.get(name, FIGURE)) for name in names if name in file.names}
            yield found

    def collect(self) -> Collected:
        """Everything but the images."""
        parts: dict[str, list[np.ndarray]] = {}
        figures = (*COMPARED, *self.scorers)
        for arrays in self.arrays("features", "logits", "labels", "predicted", "rows", "seconds", *figures):
            for name, value in arrays.items():
                parts.setdefault(name, []).append(value)
        joined = {name: np.concatenate(values) for name, values in parts.items() if values[0].ndim}
        return Collected(
            features=torch.from_numpy(joined["features"]),
            logits=torch.from_numpy(joined["logits"]) if "logits" in joined else None,
            labels=joined["labels"].tolist() if "labels" in joined else None,
            predicted=joined.get("predicted"),
            rows=int(sum(parts["rows"])),
            seconds=float(sum(parts["seconds"])),
            compared={name: joined[name] for name in figures if name in joined},
        )

    def write_npz(self, path: Path) -> None:
        """All images as `arr_0` (N, H, W, 3), uint8, and the labels as `arr_1`: what ADM's evaluator reads.

        Written piece by piece: 50,000 images of 256×256 pixels are 9.8 GB.
        """
        labels = [arrays["labels"] for arrays in self.arrays("labels") if "labels" in arrays]
        first = next(self.arrays("images"))["images"]
        shape = (len(self.source), *first.shape[2:], 3)
        with whole_file(path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for arrays in self.arrays("images"):
                    images = arrays["images"].transpose(0, 2, 3, 1)
                    file.write(np.broadcast_to(images, (*images.shape[:3], 3)).tobytes())
            if labels:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.concatenate(labels), allow_pickle=False)


def is_own(folder: Path) -> bool:
    """Whether `Shards` made a folder: its name is the hash of the manifest in it."""
    try:
        return not folder.is_symlink() and fingerprints.of_values(read_json(folder / MANIFEST)) == folder.name
    except InputError:
        return False


def slug(name: str) -> str:
    """A row's name as a part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")
