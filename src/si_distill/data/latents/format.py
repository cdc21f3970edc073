"""Files of a cache of latents: what a VAE makes of a data set's images, encoded once.

A folder with

* `latents.json`, the manifest, written last: a folder without it is not finished;
* `shard_*.safetensors`: `moments` (N, 2, 2, C, h, w), for each image (as it is, mirrored) × (mean, standard deviation) of
  the VAE's posterior in the VAE's own scale, and `labels` (N,);
* `vae/`, the VAE itself, so that a teacher that is trained on the cache is a whole pipeline.

Safetensors are mapped into memory: an image's moments are one contiguous read, in any order, and nothing has to fit into
RAM.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ... import fingerprints
from ...errors import InputError
from ...files import whole_file, write_text
from ...reading import check_shape, parse_json, read_json
from ..config import DataConfig

MANIFEST = "latents.json"
VAE_FOLDER = "vae"
#: Name of a shard's metadata.
HEADER = "latents"
#: Raised when the meaning of the files changes.
FORMAT = 1
# What a manifest must hold (see `read_json`).
_SHAPE = {
    "recipe": {
        "vae": {"name": str, "encoder": str},
        "scaling": dict,
        "data": {"name": str, "image_size": int},
        "parts": dict,
        "latent_shape": [int],
        "dtype": str,
    },
    "class_names": [str],
    "shards": [{"file": str, "images": int, "skipped": int, "bytes": int, "hash": str}],
}
#: Parts of a VAE that have no say in what its encoder makes of an image.
_DECODER = ("decoder.", "post_quant_conv.")


@dataclass(frozen=True)
class Shard:
    """The manifest's entry of a file.

    Args:
        file: its name.
        images: N.
        skipped: images next to them that could not be read.
        bytes: size of the file.
        hash: of its tensors.
    """

    file: str
    images: int
    skipped: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class Recipe:
    """What latents are made of. Every shard says it, so that shards of different recipes are never mixed.

    Args:
        vae: `name` (folder or Hub id), `revision` (the Hub's commit, or None), `class`, and `encoder`, the hash of the
            weights that make latents.
        scaling: fields of `LatentScaling`.
        data: settings of the images (`DataConfig`).
        parts: what tells their parts apart from those of other images (`ImageParts.identity`).
        crop: how images were brought to `data.image_size`.
        latent_shape: [C, h, w].
        dtype: of the stored moments.
        mixed_precision: of the VAE's forward.
        images_per_shard: at most.
    """

    vae: dict[str, Any]
    scaling: dict[str, Any]
    data: dict[str, Any]
    parts: dict[str, Any]
    crop: str
    latent_shape: list[int]
    dtype: str
    mixed_precision: str
    images_per_shard: int

    def difference(self, other: "Recipe") -> str:
        """A readable list of differences that change the latents; empty if there are none (a VAE may have moved)."""
        pairs = [(name, value, getattr(other, name)) for name, value in self.__dict__.items()]
        nested = [
            (f"{name}.{key}", value.get(key), now.get(key))
            for name, value, now in pairs
            if isinstance(value, dict)
            for key in {**value, **now}
            if (name, key) not in (("vae", "name"), ("vae", "revision"))
        ]
        flat = [pair for pair in pairs if not isinstance(pair[1], dict)]
        return "; ".join(f"{name}: {then!r} then, {now!r} now" for name, then, now in nested + flat if then != now)


@dataclass(frozen=True)
class Manifest:
    """A whole cache.

    Args:
        recipe: what it is made of.
        class_names: of the classes 0 … K − 1; empty without labels.
        shards: in the order of the data set.
    """

    recipe: Recipe
    class_names: list[str]
    shards: list[Shard]

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    @property
    def skipped(self) -> int:
        return sum(shard.skipped for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically, with readable totals and a hash that reveals manual changes."""
        values = {"format": FORMAT, "images": self.images, "skipped": self.skipped, **asdict(self)}
        text = json.dumps({**values, "hash": fingerprints.of_values(values)}, indent=1) + "\n"
        write_text(folder / MANIFEST, text)


def is_latent_cache(name: str) -> bool:
    """Whether the name of a data set is the folder of a cache, or of one that is not finished."""
    path = Path(name)
    return path.is_dir() and ((path / MANIFEST).is_file() or next(path.glob("shard_*.safetensors*"), None) is not None)


def images_of(config: DataConfig) -> DataConfig:
    """Settings of the images behind a cache of latents, or, for other data, the same settings.

    Raises:
        InputError: when it is not finished or was changed.
    """
    return DataConfig(**read_manifest(config.name).recipe.data) if is_latent_cache(config.name) else config


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        InputError: when it is missing, unreadable, of another format, or was changed by hand.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise InputError(
            f"The latent cache {folder} has no {MANIFEST}: it is not finished. Run the command that makes it "
            "(`si-distill precompute-latents`) again; what is there is kept."
        )
    try:
        values = read_json(file, dict, "Restore it, or make the cache again.")
        check_shape(values, {"format": int, "hash": str})
        written, version = values.pop("hash"), values["format"]
        intact = written == fingerprints.of_values(values)
        if version == FORMAT:
            check_shape(values, _SHAPE)
            strange = [shard["file"] for shard in values["shards"] if Path(shard["file"]).name != shard["file"]]
            if strange or len(values["recipe"]["latent_shape"]) != 3:
                raise ValueError(f"it names files elsewhere: {strange[0]}" if strange else "latents have three axes")
            manifest = Manifest(
                Recipe(**values["recipe"]), list(values["class_names"]), [Shard(**shard) for shard in values["shards"]]
            )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not the manifest of a latent cache: {type(error).__name__}: {error}.") from error
    if version != FORMAT:
        raise InputError(f"The latent cache {folder} has format {version}; this version reads {FORMAT}: make it again.")
    if not intact:
        raise InputError(
            f"{file} was changed after it was written: it does not fit its own hash. What it says must be what the latents "
            "are: restore it, or delete it and run `si-distill precompute-latents` again with the settings of the cache."
        )
    return manifest


def write_shard(path: Path, recipe: Recipe, moments: torch.Tensor, labels: torch.Tensor, skipped: int) -> Shard:
    """Writes a shard under another name, brings it to the disk, and renames it."""
    tensors = {"labels": labels, "moments": moments}
    digest = fingerprints.of_tensors(tensors.items())
    header = {"file": path.name, "recipe": asdict(recipe), "skipped": skipped, "hash": digest}
    with whole_file(path) as file:  # `save_file` would make it readable for its owner alone
        file.write(save(tensors, metadata={HEADER: json.dumps(header)}))
    return Shard(path.name, len(labels), skipped, path.stat().st_size, digest)


def shard_recipe(path: Path) -> Recipe | None:
    """What a shard says it is made of; None of a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return Recipe(**_header(file)["recipe"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def whole_shard(path: Path) -> Shard | None:
    """The entry of a shard whose name and tensors are those that it says it has; None of any other."""
    try:
        with safe_open(path, framework="pt") as file:
            header, tensors = _header(file), {name: file.get_tensor(name) for name in ("labels", "moments")}
        if (header["file"], header["hash"]) == (path.name, fingerprints.of_tensors(tensors.items())):
            size = path.stat().st_size
            return Shard(path.name, len(tensors["labels"]), header["skipped"], size, header["hash"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


def shard_labels(path: Path, shard: Shard) -> list[int]:
    """The labels of a shard that has the size and the hash of the manifest's entry; its moments are not read.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not path.is_file():
        raise ValueError("the file is missing")
    if path.stat().st_size != shard.bytes:
        raise ValueError(f"the file has {path.stat().st_size} bytes instead of {shard.bytes}")
    try:
        with safe_open(path, framework="pt") as file:
            found, labels = _header(file)["hash"], file.get_tensor("labels").tolist()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(str(error)) from error
    if found != shard.hash:
        raise ValueError(f"the file holds other latents (hash {found}) than the manifest says ({shard.hash})")
    return labels


def _header(file: Any) -> dict[str, Any]:
    """What an open shard says of itself: one value, because safetensors writes several in any order."""
    return parse_json((file.metadata() or {})[HEADER], {"file": str, "recipe": dict, "skipped": int, "hash": str})


def map_moments(path: Path) -> torch.Tensor:
    """The moments of a shard, mapped into memory: read from the disk where they are looked at."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("moments")


def encoder_hash(vae: torch.nn.Module) -> str:
    """Hash of the weights that make latents: VAEs that differ in the decoder alone (sd-vae-ft-ema, -mse) have the same."""
    return fingerprints.of_tensors(
        sorted((name, tensor) for name, tensor in vae.state_dict().items() if not name.startswith(_DECODER))
    )
