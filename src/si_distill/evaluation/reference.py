"""What generated images are compared with: features of a data set, computed once, or published statistics."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..conversion.pickles import load_plain_pickle
from ..conversion.shown import some
from ..errors import InputError
from ..files import refuse_links, whole_file
from ..reading import parse_json
from .features import INCEPTION, Extractor
from .formulas import Moments
from .npz import REAL, REMEDY, open_npz
from .samples import DatasetSource
from .shards import Shards

#: Features that are kept for the metrics that need more than mean and covariance; spread evenly over larger data sets.
KEPT_FEATURES = 50_000
#: More could not be listed.
MOST_IMAGES = 10**8
#: No network's features are larger; the figures of larger ones would be infinite.
LARGEST_FEATURE = 1e12
#: Of the largest entry of a covariance, what may be lacking of its symmetry and positivity, as rounding does.
ROUNDING = 1e-3
#: What a file of statistics may hold: dimensions and types.
ARRAYS = {
    "mu": (1, *REAL),
    "sigma": (2, *REAL),
    "manifest": (0, np.str_),
    "features": (2, *REAL),
    "indices": (1, np.integer),
    "labels": (1, np.integer),
}
_TEXT = (str, None)
MANIFEST = {
    "name?": str, "resolution?": (int, None), "count?": (int, None), "source?": {"probe?": _TEXT}, "features?": _TEXT,
    "weights?": _TEXT, "version?": _TEXT,
}  # fmt: skip


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
        InputError: when the cache cannot be written, or an image not be read; or of fewer than two images.
    """
    if len(source) < 2:
        raise InputError(
            f"The data set {source.data.name} has {len(source)} image to compare with, and its covariance needs at least 2: "
            "give more images, or a file of statistics as `reference`."
        )
    shards = Shards(cache, source, extractor)
    refuse_links(cache, (shards.folder.name,))
    path = cache / f"{shards.folder.name}.npz"
    if not path.exists():
        shards.make(state, batch_size, f"reference {source.data.name}")
        if state.is_main_process:
            manifest = {
                **shards.identity,
                "name": source.data.name,
                "resolution": source.data.size if isinstance(source.data.size, int) else None,
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
    try:
        return _checked(found, path.name)
    except ValueError as error:
        raise InputError(f"Cannot use the reference statistics in {path}: {error}. {REMEDY}") from error


def _checked(found: dict[str, Any], name: str) -> Reference:
    """The statistics among what a file holds; a ValueError says what is wrong with them."""
    if "mu" not in found or "sigma" not in found:
        raise ValueError(
            f"it holds {', '.join(sorted(map(str, found))) or 'nothing'}; reference statistics are `mu` and `sigma`"
        )
    mean = _real("mu", found["mu"], LARGEST_FEATURE).astype(np.float64)
    covariance = _real("sigma", found["sigma"], LARGEST_FEATURE**2).astype(np.float64)
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"it holds mu of shape {mean.shape} and sigma of shape {covariance.shape}; (D,) and (D, D) are needed"
        )
    _check_covariance(covariance)
    try:
        manifest = parse_json(str(found["manifest"]), MANIFEST) if "manifest" in found else {}
    except ValueError as error:
        raise ValueError(f"of its manifest, {error}") from None
    if "shape" in found:  # ADM's reference batches carry their images
        manifest |= {"count": found["shape"][0], "resolution": found["shape"][1]}
    count, features, indices, labels = manifest.get("count"), *map(found.get, ("features", "indices", "labels"))
    if count is not None and not 1 <= count <= MOST_IMAGES:
        raise ValueError(f"it is said to be of {count:,} images, and 1 to {MOST_IMAGES:,} can be compared with")
    if features is not None and (features.shape[1:] != mean.shape or not len(features)):
        raise ValueError(
            f"it holds features of shape {features.shape} and mu of {mean.shape}; (M, D) and (D,) are needed"
        )
    if indices is not None:
        images = min(count or MOST_IMAGES, MOST_IMAGES if labels is None else len(labels))
        if features is None or len(indices) != len(features) or indices.min() < 0 or indices.max() >= images:
            raise ValueError(f"its indices do not say, for each of its features, which of {images:,} images it is of")
    return Reference(
        name=manifest.get("name", name),
        mean=mean,
        covariance=covariance,
        count=count,
        manifest=manifest,
        features=None if features is None else torch.from_numpy(_real("features", features, LARGEST_FEATURE)),
        indices=indices,
        labels=None if labels is None else labels.tolist(),
    )


def _real(name: str, values: Any, largest: float) -> np.ndarray:
    values = np.asarray(values)
    if not any(np.issubdtype(values.dtype, kind) for kind in REAL):
        raise ValueError(f"it holds {name} of {values.dtype}, and real numbers are needed")
    if values.size and not max(values.max(), -float(values.min())) <= largest:
        raise ValueError(f"it holds values of {name} that are not finite, or beyond ±{largest:g}")
    return values


def _check_covariance(covariance: np.ndarray) -> None:
    slack = ROUNDING * np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > slack:
        raise ValueError("its sigma is not symmetric, and no covariance")
    try:
        np.linalg.cholesky(covariance + (slack + np.finfo(np.float64).tiny) * np.eye(len(covariance)))
    except np.linalg.LinAlgError:
        raise ValueError("its sigma has negative eigenvalues, and no covariance does") from None


def _read_pickle(path: Path, features: str) -> dict[str, Any]:
    found = load_plain_pickle(path)
    wanted = EDM2_NAMES.get(features)
    if not isinstance(found, dict) or not isinstance(found.get(wanted), dict):
        names = some(found) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} holds {names}, but no statistics of {features}.")
    statistics = found[wanted]
    names = ("mu", "sigma")
    return {name: statistics[name] for name in names} if set(names) <= statistics.keys() else statistics


def _read_npz(path: Path) -> dict[str, Any]:
    with open_npz(path, "reference statistics") as file:
        found: dict[str, Any] = {name: file.read(name, *ARRAYS[name]) for name in ARRAYS if name in file.names}
        if "arr_0" in file.names:  # only its shape: the images themselves may be gigabytes
            found["shape"] = file.shape("arr_0", 4, np.uint8)
        return found if {"mu", "sigma"} <= found.keys() else dict.fromkeys(file.names)


def check_reference(
    reference: Reference,
    path: str,
    extractor: Extractor,
    channels: int,
    size: int,
    data: DatasetSource | None,
    height: int | None = None,
) -> None:
    """Refuses statistics of other features, another resolution or other data than what is evaluated.

    Args:
        reference: read from the file `path`.
        extractor: of the evaluated images.
        channels, size: of the evaluated images.
        data: the data set that gives the class balance, if one does.
        height: of the evaluated images, where it is not their `size`.

    Raises:
        InputError: says what differs. A published file without a manifest says nothing of weights, and of the resolution
            only if it carries its images: then only the number of features can be compared.
    """
    height = size if height is None else height
    width = extractor(torch.zeros(1, channels, height, size, dtype=torch.uint8))[0].shape[1]
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
    if found.get("resolution") is not None and {found["resolution"]} != {size, height}:
        raise InputError(
            f"The reference {path} was made from images of {found['resolution']}×{found['resolution']} pixels, but the "
            f"evaluated ones are {size}×{height}: these two do not compare."
        )
    if data is not None and reference.indices is not None and reference.indices.max() >= len(data):
        raise InputError(
            f"The reference {path} has features of more images than the {len(data):,} of `data`: leave one of them out."
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
