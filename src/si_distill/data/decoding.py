"""Encoded images to uint8 tensors of one size: the only place where files are decoded and cropped."""

import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..pipelines.interpolant_pipeline_images import is_grey, to_eight_bits

__all__ = ["CROP", "UnreadableImage", "centre_crop", "decode", "is_grey", "stored_size", "to_pixels"]

#: What `to_pixels` does, for what is made of its images and kept.
CROP = "ADM: halved by averaging while at least twice the size, bicubic, centre square"


#: Largest encoded image that is read.
IMAGE_BYTES = 2**28


class UnreadableImage(InputError):
    """Bytes that are no image, or one that is cut off."""


def decode(value: Any) -> Image.Image:
    """The image in a row of a data set, as it is stored: of any mode, not turned by its EXIF orientation (as ADM reads it).

    Args:
        value: what `datasets` gives for an image without decoding: {"bytes": …, "path": …} with one of them; or bytes.

    Raises:
        UnreadableImage: whatever is wrong with it.
    """
    image = _open(value)
    try:
        image.load()
    except (
        Exception
    ) as error:  # Pillow's plugins raise nearly anything on malformed files: SyntaxError, struct.error, …
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return image


def stored_size(value: Any) -> tuple[int, int]:
    """Width and height of an encoded image, without decoding it.

    Raises:
        UnreadableImage: when it is none.
    """
    return _open(value).size


def _open(value: Any) -> Image.Image:
    if value is None:
        raise UnreadableImage("it is missing: the column is empty there")
    try:
        return Image.open(io.BytesIO(_content(value)))
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    path = str(value["path"])
    if "://" not in path and not Path(path).is_file():  # a device or a pipe would never end
        raise UnreadableImage(f"{path} is no file")
    with fsspec.open(path, "rb") as file:
        content = file.read(IMAGE_BYTES + 1)
    if len(content) > IMAGE_BYTES:
        raise UnreadableImage(f"{path} is larger than {IMAGE_BYTES:,} bytes")
    return content


def to_pixels(image: Image.Image, channels: int, size: int | tuple[int, int]) -> torch.Tensor:
    """(channels, height, width), uint8: grey (1 channel) or RGB (3), cut to `size` around the centre.

    Raises:
        UnreadableImage: for colour spaces without a conversion.
    """
    try:
        image = to_eight_bits(image, channels)
    except ValueError as error:
        raise UnreadableImage(str(error)) from error
    image = centre_crop(image, size)
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"), on which teachers of
    ImageNet and its published reference statistics rest.

    Halved by averaging while the shorter side is at least twice `size`, then bicubic to a shorter side of `size`, then the
    square in the middle. An image that has the size already is not touched. Of a height and a width the same: the smallest
    image that covers them, then its middle.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = _without_far_ends(image)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """A strip cut to the part around its centre: 1 × 5000 pixels would grow to 256 × 1,280,000 before they are cropped."""
    short, long = sorted(image.size)
    if long <= 16 * short:
        return image
    cut = (long - 16 * short) // 2
    horizontal, vertical = (cut, 0) if image.width > image.height else (0, cut)
    return image.crop((horizontal, vertical, image.width - horizontal, image.height - vertical))
