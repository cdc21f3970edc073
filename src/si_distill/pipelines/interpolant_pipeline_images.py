"""Images as they come: the one conversion of pictures, and the checked image input of a pipeline.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch, numpy and PIL.
"""

from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

#: How a small image is brought to the network's size.
UPSAMPLING_MODES = ("nearest", "bicubic")

ImageInput = PIL.Image.Image | np.ndarray | torch.Tensor | list


def is_grey(image: PIL.Image.Image) -> bool:
    """Whether the image has one channel."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def to_eight_bits(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    The image with 8 bits, in grey (1 channel) or RGB (3): the same for training data, evaluations and pipelines.

    Palettes are resolved, CMYK is converted, transparency is dropped, 16-bit grey keeps its upper 8 bits. It is not turned
    by its EXIF orientation: ADM's preprocessing, on which published teachers and statistics rest, does not do so either.

    Raises:
        ValueError: for an image that cannot be read, or has no such conversion.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    try:
        image.load()
        if image.mode.startswith("I"):  # Pillow's own conversion cuts off everything above 255
            levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
            image = PIL.Image.fromarray(levels.astype(np.uint8))
        if image.mode not in ("1", "L", "LA", "RGB", "RGBA", mode):  # from a palette or CMYK to grey by way of colours
            image = image.convert("RGB")
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # Pillow's plugins raise nearly anything on malformed files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def upsample(images: torch.Tensor, factor: int, mode: str) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1] enlarged by a whole factor: each pixel as a square (`nearest`), or `bicubic`, cut off
    at -1 and 1.
    """
    if mode == "nearest":
        return F.interpolate(images, scale_factor=factor, mode="nearest")
    return F.interpolate(images, scale_factor=factor, mode="bicubic", align_corners=False).clamp(-1, 1)


def read_images(image: ImageInput, channels: int) -> torch.Tensor:
    """
    The images as one float32 tensor (B, channels, H, W) in [-1, 1].

    Args:
        image: one of
            * a PIL image, or a list of them, converted to these channels (see `to_eight_bits`);
            * an array (H, W), (H, W, C) or (B, H, W, C), or a list of the first two: uint8, or floating point in [0, 1];
            * a tensor (C, H, W) or (B, C, H, W), or a list of the first: uint8, or floating point in [-1, 1].
        channels: of the network's images, 1 or 3.

    Raises:
        ValueError: for no images, images of two sizes, another number of channels, or values out of range.
        TypeError: for something else than images.
    """
    parts = list(image) if isinstance(image, (list, tuple)) else [image]
    if not parts:
        raise ValueError("`image` is empty: pass at least one image.")
    tensors = [tensor for part in parts for tensor in _tensors(part, channels)]
    for tensor in tensors:
        if tensor.shape[0] != channels:
            raise ValueError(
                f"`image` has {tensor.shape[0]} channel{'s' if tensor.shape[0] > 1 else ''}, but this network's images have "
                f"{channels}: convert it, e.g. with PIL's `.convert({'L' if channels == 1 else 'RGB'!r})`."
            )
    sizes = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
    if len(sizes) > 1:
        listing = ", ".join(f"{width}×{height}" for height, width in sizes)
        raise ValueError(f"The images of `image` have different sizes ({listing}): bring them to one size first.")
    return torch.stack(tensors)


def fit_images(images: torch.Tensor, size: int, upsampling: dict[str, Any] | None) -> torch.Tensor:
    """
    The images (B, C, size, size).

    Args:
        images: (B, C, H, W).
        size: height and width of the network's images.
        upsampling: `{"factor": …, "mode": …}` of a network that was trained on images downsampled by that factor: those of
            size / factor are enlarged as they were in training. None: only images of the network's size fit.

    Raises:
        ValueError: for another size.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    fitting = f"{size}×{size}"
    if upsampling:
        small = size // upsampling["factor"]
        if (height, width) == (small, small):
            return upsample(images, upsampling["factor"], upsampling["mode"])
        fitting += f", or the small ones of {small}×{small} that it was trained to enlarge"
    raise ValueError(
        f"`image` has {width}×{height} pixels, but this network takes {fitting}: crop it to a square and resize it."
    )


def _tensors(part: Any, channels: int) -> list[torch.Tensor]:
    """Float32 tensors (C, H, W) in [-1, 1]; PIL images have `channels` of them."""
    if isinstance(part, PIL.Image.Image):
        try:
            part = np.array(to_eight_bits(part, channels))
        except ValueError as error:
            raise ValueError(f"`image` cannot be used: {error}.") from error
    if isinstance(part, np.ndarray):
        if part.ndim not in (2, 3, 4):
            raise ValueError(f"`image` has the shape {part.shape}; arrays are (H, W), (H, W, C) or (B, H, W, C).")
        try:
            part = np.ascontiguousarray(part, part.dtype.newbyteorder("="))
            array = torch.from_numpy(part[..., None] if part.ndim == 2 else part)
        except TypeError:  # objects, text, wide floats
            raise ValueError(f"`image` is of {part.dtype}; images are uint8 or floating point.") from None
        array = array[None] if array.ndim == 3 else array
        return list(_scaled(array.movedim(-1, 1), 0.0))
    if torch.is_tensor(part):
        if part.ndim not in (3, 4):
            raise ValueError(f"`image` has the shape {tuple(part.shape)}; tensors are (C, H, W) or (B, C, H, W).")
        return list(_scaled(part[None] if part.ndim == 3 else part, -1.0))
    raise TypeError(f"`image` holds a {type(part).__name__}; images are PIL images, NumPy arrays or tensors.")


def _scaled(images: torch.Tensor, lowest: float) -> torch.Tensor:
    """Images in [-1, 1] of uint8 levels, or of numbers from `lowest` to 1."""
    if not images.numel():
        raise ValueError(f"`image` is empty: its shape is {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise ValueError(f"`image` is of {images.dtype}; images are uint8 or floating point.")
    low, high = float(images.min()), float(images.max())
    if not (lowest - 1e-3 <= low and high <= 1 + 1e-3):  # also not a number
        raise ValueError(
            f"`image` has values from {low:.4g} to {high:.4g}; floating point {'arrays' if lowest == 0 else 'tensors'} hold "
            f"values from {lowest:g} to 1."
        )
    images = images.float()
    return images if lowest == -1 else images * 2 - 1
