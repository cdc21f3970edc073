"""Where evaluated images come from: a pipeline, a folder or file of images, or a data set; all read by index."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .. import fingerprints
from ..data import ImageDataset
from ..errors import InputError
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
from ..pipelines.interpolant_pipeline_images import to_eight_bits
from ..sample_noise import SampleNoise, sample_seed
from ..visualization import to_uint8
from .formulas import peak_signal_to_noise, spread
from .inputs import Inputs
from .npz import open_npz

#: How many of the first inputs are drawn several times, and how often, to see how the images of one input differ.
SPREAD_INPUTS, SPREAD_DRAWS = 64, 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Batch:
    """Some images.

    Args:
        images: (B, C, H, W), uint8, on the CPU.
        labels: the class of each, or None.
        rows: rows that went through the network for them; a guided evaluation counts twice.
        seconds: that it took to make them, decoding included.
        compared: figures of each image next to its input's truth and its like (see `PipelineSource`), each (B,).
    """

    images: torch.Tensor
    labels: list[int] | None = None
    rows: int = 0
    seconds: float = 0.0
    compared: dict[str, np.ndarray] = field(default_factory=dict)


class Source(Protocol):
    """Images by index.

    Attributes:
        labels: the class of each image, or None.
        identity: plain values; two sources with the same ones give the same images.
    """

    labels: list[int] | None
    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Batch:
        """The images of these indices, in any order and any grouping."""
        ...


@dataclass(eq=False)
class PipelineSource:
    """Images of a pipeline: image i depends on (seed, i) and its label alone, whatever the batch.

    A sampler that draws noise of its own gets a generator for each image.

    Args:
        pipeline: its `transformer` is watched.
        call: `call(class_labels=…, latents=…, generator=[…])` returns a pipeline output whose images are (B, C, H, W) in
            [0, 1] (`output_type="pt"`). A pipeline without classes gets `batch_size` in place of the labels.
        labels: a class for each image; None with `count` for a pipeline without classes. One that takes images may have
            none itself: then these are the classes of its inputs.
        seed: of the noise.
        count: number of images when there are no labels.
        settings: of the sampler, for the identity.
        inputs: of a pipeline that takes images. Each image is then compared: `psnr` with the input's truth (of pairs), and
            of the first inputs `spread`, the variance of a pixel in [0, 1] over further images of the same input.
    """

    pipeline: InterpolantPipeline | OneStepInterpolantPipeline
    call: Callable[..., Any]
    labels: list[int] | None
    seed: int
    count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        self._noise = SampleNoise(self.seed, self.pipeline._execution_device)

    def __len__(self) -> int:
        return self.count if self.labels is None else len(self.labels)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **identity_of(self.pipeline),
            "sampler": self.settings,
            "seed": self.seed,
            "dtype": str(self.pipeline.transformer.dtype),
            **({} if self.inputs is None else {"inputs": self.inputs.identity}),
        }

    def read(self, indices: Sequence[int]) -> Batch:
        started = time.perf_counter()
        with counted_rows(self.pipeline.transformer) as rows:
            images = self._draw(indices, 0)
        seconds = time.perf_counter() - started
        return Batch(images, _of(self.labels, indices), sum(rows), seconds, self._compared(indices, images))

    def _draw(self, indices: Sequence[int], draw: int) -> torch.Tensor:
        """Images (B, C, H, W), uint8, on the CPU; another `draw` is other noise for the same labels and inputs."""
        pipeline = self.pipeline
        given: dict[str, Any] = {}
        counters = (0, draw) if draw else ()
        if pipeline.noise_shape is not None:
            given["latents"] = self._noise.normal(pipeline.noise_shape, "evaluation", *counters, indices=indices)
        if pipeline.network.num_classes:
            given["class_labels"] = [self.labels[i] for i in indices]
        if self.inputs is not None:
            given["image"] = self.inputs.read(indices)
        elif not pipeline.network.num_classes:
            given["batch_size"] = len(indices)
        seeds = [sample_seed(self.seed, "evaluation", 1 + draw, i) for i in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return to_uint8(self.call(**given, generator=generators).images * 2 - 1).cpu()

    def _compared(self, indices: Sequence[int], images: torch.Tensor) -> dict[str, np.ndarray]:
        if self.inputs is None:
            return {}
        found, truth = {}, self.inputs.truth(indices)
        if truth is not None:
            found["psnr"] = peak_signal_to_noise(images, truth).numpy()
        found["spread"] = np.full(len(images), np.nan)
        first = [place for place, index in enumerate(indices) if index < SPREAD_INPUTS]
        if first:
            again = [self._draw([indices[place] for place in first], draw) for draw in range(1, SPREAD_DRAWS)]
            draws = torch.stack([images[first], *again]).double() / 255
            found["spread"][first] = spread(draws).numpy()
        return found


def identity_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Hashes of the weights of all networks of a pipeline, and of its scheduler's settings."""
    modules = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    return {
        "weights": {name: fingerprints.of_module(module) for name, module in modules.items()},
        # Without diffusers' own notes in it, such as a list in the order of a set: other in each process.
        "scheduler": fingerprints.of_values({k: v for k, v in pipeline.scheduler.config.items() if k[0] != "_"}),
    }


@contextmanager
def counted_rows(network: torch.nn.Module) -> Iterator[list[int]]:
    """A list of the rows of each forward of a network, whose result is a tuple, while this is open."""
    rows: list[int] = []
    hook = network.register_forward_hook(lambda module, arguments, result: rows.append(len(result[0])))
    try:
        yield rows
    finally:
        hook.remove()


@dataclass(eq=False)
class InputSource:
    """What bridges start from, as images: how far the data are before anything is done."""

    inputs: Inputs
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.inputs.places)

    @property
    def identity(self) -> dict[str, Any]:
        return {"inputs": self.inputs.identity}

    def read(self, indices: Sequence[int]) -> Batch:
        started = time.perf_counter()
        images, truth = to_uint8(self.inputs.read(indices)), self.inputs.truth(indices)
        compared = {} if truth is None else {"psnr": peak_signal_to_noise(images, truth).numpy()}
        return Batch(images, _of(self.labels, indices), 0, time.perf_counter() - started, compared)


@dataclass(eq=False)
class DatasetSource:
    """The images of a data set, with its settings."""

    data: ImageDataset
    settings: dict[str, Any]

    @property
    def labels(self) -> list[int]:
        return self.data.labels

    def __len__(self) -> int:
        return len(self.data)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, and hashes of the labels and of 16 images: a changed data set of the same name has others."""
        chosen = sorted({i * (len(self) - 1) // 15 for i in range(16)})
        images = [(str(i), self.data.read(i)) for i in chosen]
        hashes = {"probe": fingerprints.of_tensors(images), "labels": fingerprints.of_values(self.labels)}
        return {**self.settings, "images": len(self), **hashes}

    def read(self, indices: Sequence[int]) -> Batch:
        started = time.perf_counter()
        images = torch.stack([self.data.read(i) for i in indices])
        return Batch(images, _of(self.labels, indices), 0, time.perf_counter() - started)


class FileSource:
    """Finished images: a folder of them (sub-folders too, in the order of their paths), or an `.npz` of samples.

    Args:
        path: the folder, or a file as `--save_npz` and ADM's sampling scripts write it: `arr_0` (N, H, W, C), uint8, and
            perhaps the labels `arr_1` (N,).
        channels: 1 or 3: grey images become RGB if the reference is.

    Raises:
        InputError: when there is nothing to read, or images differ in size.
    """

    def __init__(self, path: str, channels: int):
        self.path, self.channels, self.labels = Path(path), channels, None
        self._arrays: np.ndarray | None = None
        self._files: list[Path] = []
        if self.path.is_dir():
            self._files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not self._files:
                raise InputError(f"The folder {path} holds no images ({', '.join(SUFFIXES)}).")
            if odd := [p for p in self._files if not p.is_file()]:  # a pipe would never end
                raise InputError(f"{odd[0]} is named as an image and cannot be read: it is not a file. Remove it.")
        elif self.path.suffix == ".npz" and self.path.is_file():
            self._arrays, self.labels = _read_npz(self.path)
        else:
            raise InputError(f"`images` {path} is neither a folder of images nor an .npz file of samples.")
        self.height, self.width = self.read([0]).images.shape[-2:]

    def __len__(self) -> int:
        return len(self._files) if self._arrays is None else len(self._arrays)

    @property
    def identity(self) -> dict[str, Any]:
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self._files or [self.path]]
        return {"images": str(self.path.resolve()), "files": fingerprints.of_values(stats), "channels": self.channels}

    def read(self, indices: Sequence[int]) -> Batch:
        if self._arrays is not None:
            images = torch.from_numpy(self._arrays[list(indices)]).permute(0, 3, 1, 2)
            return Batch(_with_channels(images, self.channels), _of(self.labels, indices))
        images = []
        for i in indices:
            try:
                with Image.open(self._files[i]) as image:
                    array = np.array(to_eight_bits(image, self.channels))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(f"The image {self._files[i]} cannot be read: {error}") from error
            images.append(torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1))
        shapes = {tuple(image.shape): self._files[i] for image, i in zip(images, indices, strict=True)}
        if len(shapes) > 1:
            listing = ", ".join(f"{path.name} {shape[1:]}" for shape, path in shapes.items())
            raise InputError(f"Images of {self.path} differ in size: {listing}. Bring them to one size first.")
        return Batch(torch.stack(images))


def _of(labels: list[int] | None, indices: Sequence[int]) -> list[int] | None:
    return None if labels is None else [labels[i] for i in indices]


def _read_npz(path: Path) -> tuple[np.ndarray, list[int] | None]:
    with open_npz(path, "samples") as file:
        if "arr_0" not in file.names:
            raise ValueError("it has no `arr_0`, and uint8 images (N, H, W, C) are needed")
        shape = file.shape("arr_0", 4, np.uint8)
        if 0 in shape or shape[-1] not in (1, 3):
            raise ValueError(f"it holds arr_0 of {shape}, and images (N, H, W, 1 or 3) are needed")
        labels = file.read("arr_1", 1, np.integer).tolist() if "arr_1" in file.names else None
        if labels is not None and len(labels) != shape[0]:
            raise ValueError(f"it holds {shape[0]} images and {len(labels)} labels")
        return file.read("arr_0", 4, np.uint8), labels


def _with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.shape[1] == channels:
        return images
    # Grey images are written as three equal channels, because readers of these files expect RGB.
    return images[:, :1] if channels == 1 else images.expand(-1, channels, -1, -1)
