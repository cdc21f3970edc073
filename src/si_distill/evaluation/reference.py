"""What generated images are compared with: features of a data set, computed once, or published statistics."""

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..conversion.pickles import load_plain_pickle
from ..errors import InputError
from ..files import whole_file
from .features import INCEPTION, Extractor
from .formulas import Moments
from .samples import DatasetSource
from .shards import Shards

#: Features that are kept for the metrics that need more than mean and covariance; spread evenly over larger data sets.
KEPT_FEATURES = 50_000


@dataclass
class Reference:
    """Statistics of real images.

    Args:
        name: how results refer to it.
        mean, covariance: of the features, (D,) and (D, D), float64.
        count: images behind them, or None where a published file does not say.
        manifest: what is known of its making.
        features: (M, D) of up to `KEPT_FEATURES` images, or None for published statistics.
        indices: (M,) which images of the data set these are.
        labels: of all its images, or None.
    """

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    manifest: dict[str, Any]
    features: torch.Tensor | None = None
    indices: np.ndarray | None = None
    labels: list[int] | None = None

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.mean, self.covariance

    @property
    def feature_labels(self) -> list[int] | None:
        """Labels of the kept features."""
        if self.labels is None or self.indices is None:
            return None
        return [self.labels[i] for i in self.indices]


def data_reference(
    source: DatasetSource, extractor: Extractor, cache: Path, state: PartialState, batch_size: int
) -> Reference:
    """The statistics of a data set, from the cache if it has them; collective.

    The name of the cached file is a hash of the data settings, of 16 of its images, of the number of images, of the
    extractor, its version and its weights: when any of these change, the statistics are computed again.

    Raises:
        InputError: when the cache cannot be written, or an image not be read.
    """
    shards = Shards(cache, source, extractor)
    path = cache / f"{shards.folder.name}.npz"
    if not path.exists():
        shards.make(state, batch_size, f"reference {source.data.name}")
        if state.is_main_process:
            manifest = {
                **shards.identity,
                "name": source.data.name,
                "resolution": source.data.size,
                "count": len(source),
            }
            _write(path, shards, manifest)
            shutil.rmtree(shards.folder, ignore_errors=True)
    state.wait_for_everyone()
    return read_reference(path, extractor.name)


def _write(path: Path, shards: Shards, manifest: dict[str, Any]) -> None:
    count = len(shards.source)
    kept = np.unique(np.linspace(0, count - 1, min(count, KEPT_FEATURES)).round().astype(np.int64))
    moments, features, labels, start = Moments(), [], [], 0
    for arrays in shards.arrays("features", "labels"):
        block = arrays["features"]
        moments.add(torch.from_numpy(block))
        features.append(block[kept[(kept >= start) & (kept < start + len(block))] - start])
        labels += arrays["labels"].tolist() if "labels" in arrays else []
        start += len(block)
    values = {"mu": moments.mean, "sigma": moments.covariance, "features": np.concatenate(features), "indices": kept}
    if labels:
        values["labels"] = np.array(labels, dtype=np.int64)
    with whole_file(path) as file:
        np.savez(file, manifest=np.array(json.dumps(manifest)), **values)


#: Names that EDM2's file of statistics has for the features of ours.
EDM2_NAMES = {INCEPTION: "fid", "dinov2-vit-l-14": "fd_dinov2"}


def read_reference(path: Path, features: str) -> Reference:
    """Statistics from a file: ours, with a manifest, or published ones: `.npz` (EDM, ADM) or `.pkl` (EDM2).

    Args:
        path: the file. Pickles are read without running anything in them.
        features: name of the extractor; EDM2's files hold statistics of several.

    Raises:
        InputError: when the file holds no mean and covariance that fit each other.
    """
    found = _read_pickle(path, features) if path.suffix == ".pkl" else _read_npz(path)
    if "mu" not in found or "sigma" not in found:
        raise InputError(
            f"{path} holds {', '.join(sorted(found)) or 'nothing'}; reference statistics are `mu` and `sigma`."
        )
    mean, covariance = (np.asarray(found[name], dtype=np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path} holds mu of shape {mean.shape} and sigma of shape {covariance.shape}; (D,) and (D, D) are needed."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} holds values that are not finite.")
    manifest = json.loads(str(found["manifest"])) if "manifest" in found else {}
    if "shape" in found:  # ADM's reference batches carry their images
        manifest |= {"count": found["shape"][0], "resolution": found["shape"][1]}
    return Reference(
        name=manifest.get("name", path.name),
        mean=mean,
        covariance=covariance,
        count=manifest.get("count"),
        manifest=manifest,
        features=torch.from_numpy(found["features"]) if "features" in found else None,
        indices=found.get("indices"),
        labels=found["labels"].tolist() if "labels" in found else None,
    )


def _read_pickle(path: Path, features: str) -> dict[str, Any]:
    found = load_plain_pickle(path)
    wanted = EDM2_NAMES.get(features)
    if not isinstance(found, dict) or not isinstance(found.get(wanted), dict):
        names = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} holds {names}, but no statistics of {features}.")
    return found[wanted]


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name != "arr_0"}
            found |= {"shape": _shape_of_images(path)} if "arr_0" in file.files else {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"Cannot read reference statistics from {path}: {error}") from error
    return found


def _shape_of_images(path: Path) -> tuple[int, ...]:
    """The shape of `arr_0` from its header: the images themselves may be gigabytes."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def check_reference(
    reference: Reference, path: str, extractor: Extractor, channels: int, size: int, data: DatasetSource | None
) -> None:
    """Refuses statistics of other features, another resolution or other data than what is evaluated.

    Args:
        reference: read from the file `path`.
        extractor: of the evaluated images.
        channels, size: of the evaluated images.
        data: the data set that gives the class balance, if one does.

    Raises:
        InputError: says what differs. A published file without a manifest says nothing of weights, and of the resolution
            only if it carries its images: then only the number of features can be compared.
    """
    width = extractor(torch.zeros(1, channels, size, size, dtype=torch.uint8))[0].shape[1]
    if width != len(reference.mean):
        raise InputError(
            f"The reference {path} has {len(reference.mean)} features and {extractor.name} gives {width}: choose the "
            "`features` that it was made with (published FID statistics: inception-v3-compat, 2048 features)."
        )
    found = reference.manifest
    for key, now in extractor.identity.items():
        if key in found and found[key] != now:
            raise InputError(
                f"The reference {path} was made with {key} {found[key]!r}, but now {key} is {now!r}: results would not be "
                "comparable. Use the same, or compute the statistics again from `data`."
            )
    if "resolution" in found and found["resolution"] != size:
        raise InputError(
            f"The reference {path} was made from images of {found['resolution']}×{found['resolution']} pixels, but the "
            f"evaluated ones are {size}×{size}: these two do not compare."
        )
    known = found.get("source", {})
    if data is not None and known:
        now = data.identity
        differing = [key for key in known if known[key] != now.get(key)]
        if differing:
            listing = "; ".join(f"{key}: {known[key]!r} there, {now.get(key)!r} now" for key in differing)
            raise InputError(
                f"The reference {path} was computed from other images than `data` ({listing}). Leave `reference` out to "
                "compute it from `data`, or take --class_balance uniform, which needs no `data`."
            )
