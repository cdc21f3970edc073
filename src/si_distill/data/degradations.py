"""Degradations: what a bridge starts from, computed from the images themselves.

Each is a function of a batch (B, C, H, W) in [-1, 1] to the same shape and range, on the device and in the dtype of the
batch; a random one is given its random numbers. Downsampling with pooling, inpainting (with the same mask) and greyscale
are projections: done twice, they are done once. All but `jpeg` commute with a flip of left and right, `inpaint` with
the mask flipped too; `jpeg` does up to rounding where 16 divides the width.
"""

import io
import math
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pipelines.interpolant_pipeline_images import UPSAMPLING_MODES, upsample
from ..schedulers.interpolant_names import build_named

#: Weights of red, green and blue in what the eye calls bright (ITU-R BT.601, as JPEG and PIL have them).
LUMA = (0.299, 0.587, 0.114)


class Degradation:
    """Base of the degradations; a subclass keeps its constructor's arguments as attributes.

    Attributes:
        numbers: how many uniform random numbers decide about one sample; 0: nothing is random.
        image_upsampling: how a pipeline brings small images to the size of the degraded ones (see
            `interpolant_pipeline_images.fit_images`), of a degradation that makes them small.
    """

    name: ClassVar[str]
    numbers: ClassVar[int] = 0
    image_upsampling: ClassVar[dict[str, Any] | None] = None

    def check_size(self, size: int) -> None:
        """Raises ValueError when images of size × size pixels cannot be degraded so."""

    def check_channels(self, channels: int) -> None:
        """Raises a ValueError when images with this number of channels cannot be degraded."""

    def __call__(self, images: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
        """The degraded images.

        Args:
            images: (B, C, H, W) in [-1, 1].
            u: (B, numbers) in [0, 1), for a random degradation.
        """
        raise NotImplementedError


class Downsample(Degradation):
    """A smaller image, enlarged again to the size that it had.

    Args:
        factor: whole number above 1 that divides the size.
        filter: `pool` (mean of factor × factor pixels) or `bicubic` (with antialiasing): the two of I2SB (Liu et al. 2023,
            "I²SB: Image-to-Image Schrödinger Bridge"; corruption/superresolution.py of NVlabs/I2SB).
        upsample: `nearest` or `bicubic`, cut off at -1 and 1.
    """

    name = "downsample"

    def __init__(self, factor: int = 2, filter: str = "pool", upsample: str = "nearest"):
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"`factor` must be a whole number of at least 2, got {factor!r}.")
        for setting, value, choices in (
            ("filter", filter, ("pool", "bicubic")),
            ("upsample", upsample, UPSAMPLING_MODES),
        ):
            if value not in choices:
                raise ValueError(f"`{setting}` is {value!r}; choose one of: {', '.join(choices)}.")
        self.factor, self.filter, self.upsample = factor, filter, upsample

    def check_size(self, size):
        if size % self.factor:
            raise ValueError(f"`factor` {self.factor} does not divide the size {size} of the images.")

    @property
    def image_upsampling(self) -> dict[str, Any]:
        return {"factor": self.factor, "mode": self.upsample}

    def small(self, images: torch.Tensor) -> torch.Tensor:
        """The smaller images, (B, C, H / factor, W / factor)."""
        if self.filter == "pool":
            return F.avg_pool2d(images, self.factor)
        size = [side // self.factor for side in images.shape[2:]]
        return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)

    def __call__(self, images, u=None):
        return upsample(self.small(images), self.factor, self.upsample)


class Inpaint(Degradation):
    """A rectangle of grey (0) over the image.

    Args:
        mask: `center`, a square in the middle; `random`, a rectangle anywhere, another for each sample and step; `left`
            or `right`, a half of the width: outpainting.
        min_side, max_side: sides of the rectangle as shares of the image's: those of `random` are uniform between the two;
            `center` has `max_side`.
    """

    name = "inpaint"

    def __init__(self, mask: str = "center", min_side: float = 0.25, max_side: float = 0.5):
        if mask not in ("center", "random", "left", "right"):
            raise ValueError(f"`mask` is {mask!r}; choose one of: center, random, left, right.")
        if not 0 < min_side <= max_side < 1:
            raise ValueError(
                f"The rectangle needs 0 < min_side <= max_side < 1, got min_side={min_side} and max_side={max_side}."
            )
        self.mask, self.min_side, self.max_side = mask, float(min_side), float(max_side)

    @property
    def numbers(self) -> int:
        return 4 if self.mask == "random" else 0

    def hole(self, images: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 1, H, W), bool: what is lost."""
        count, _, height, width = images.shape
        kind = dict(device=images.device)
        row, column = torch.arange(height, **kind)[None, :, None], torch.arange(width, **kind)[None, None, :]
        if self.mask == "center":
            top, left = ((side - max(1, round(self.max_side * side))) // 2 for side in (height, width))
            inside = (row >= top) & (row < height - top) & (column >= left) & (column < width - left)
        elif self.mask in ("left", "right"):
            inside = (row >= 0) & ((column < width // 2) if self.mask == "left" else (column >= width - width // 2))
        else:
            inside = True
            for places, side, (extent, start) in ((row, height, u[:, :2].T), (column, width, u[:, 2:].T)):
                extent = self.min_side + (self.max_side - self.min_side) * extent
                extent = (extent * side).round().clamp(1, side - 1)[:, None, None]
                first = (start[:, None, None] * (side - extent + 1)).floor()
                inside = inside & (places >= first) & (places < first + extent)
        return inside.expand(count, height, width)[:, None]

    def __call__(self, images, u=None):
        return images.masked_fill(self.hole(images, u), 0.0)


class Blur(Degradation):
    """A Gaussian blur with mirrored edges.

    Args:
        sigma: standard deviation in pixels; the kernel ends at 3 σ.
    """

    name = "blur"

    def __init__(self, sigma: float = 1.0):
        if not 0 < sigma < math.inf:
            raise ValueError(f"`sigma` must be a positive number of pixels, got {sigma!r}.")
        self.sigma = float(sigma)

    @property
    def radius(self) -> int:
        """Of the kernel, in pixels."""
        return math.ceil(3 * self.sigma)

    def check_size(self, size):
        if self.radius >= size:
            raise ValueError(f"`sigma` {self.sigma:g} needs {self.radius} mirrored pixels and the images have {size}.")

    def __call__(self, images, u=None):
        places = torch.arange(-self.radius, self.radius + 1, device=images.device, dtype=images.dtype)
        kernel = torch.softmax(-0.5 * (places / self.sigma) ** 2, 0)
        padded = F.pad(images, [self.radius] * 4, mode="reflect")
        channels = images.shape[1]
        rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
        return F.conv2d(rows, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels).clamp(-1, 1)


class Greyscale(Degradation):
    """The brightness of an RGB image in all three channels (ITU-R BT.601)."""

    name = "greyscale"

    def check_channels(self, channels):
        if channels != 3:
            raise ValueError(f"images of {channels} channel{'s' if channels > 1 else ''} have no colours to lose.")

    def __call__(self, images, u=None):
        return luma(images).expand_as(images)


class JPEG(Degradation):
    """JPEG compression and back, through 8-bit levels, on the CPU.

    Args:
        quality: 1 … 95, as PIL has it. I2SB restores 5 and 10.
    """

    name = "jpeg"

    def __init__(self, quality: int = 10):
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ValueError(f"`quality` must be a whole number from 1 to 95, got {quality!r}.")
        self.quality = quality

    def check_channels(self, channels):
        if channels not in (1, 3):
            raise ValueError(f"a JPEG has 1 or 3 channels, and these images have {channels}.")

    def __call__(self, images, u=None):
        levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        coded = [self._coded(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]
        decoded = torch.from_numpy(np.stack(coded)).permute(0, 3, 1, 2)
        return (decoded.float() / 127.5 - 1).to(images)

    def _coded(self, array: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        grey = array.shape[-1] == 1
        Image.fromarray(array[..., 0] if grey else array).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file)).reshape(array.shape)


class Edges(Degradation):
    """The strength of the edges of the brightness (Sobel's operator), black where there are none, in all channels.

    Args:
        gain: what the strength is multiplied with before it is cut off at white; with 1 a step of full contrast along an
            axis is white.
    """

    name = "edges"

    def __init__(self, gain: float = 1.0):
        if not 0 < gain < math.inf:
            raise ValueError(f"`gain` must be a positive number, got {gain!r}.")
        self.gain = float(gain)

    def check_channels(self, channels):
        if channels not in (1, 3):
            raise ValueError(f"edges are those of 1 or 3 channels, and these images have {channels}.")

    def __call__(self, images, u=None):
        grey = luma(images) if images.shape[1] == 3 else images
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device)
        kernels = torch.stack([across, across.T])[:, None].to(images.dtype) / 8  # a step from -1 to 1 gives 1
        slopes = F.conv2d(F.pad(grey, [1] * 4, mode="replicate"), kernels)
        strength = slopes.square().sum(1, keepdim=True).sqrt()
        return ((2 * self.gain * strength).clamp(max=2) - 1).expand_as(images)


DEGRADATIONS: dict[str, type[Degradation]] = {
    cls.name: cls for cls in (Downsample, Inpaint, Blur, Greyscale, JPEG, Edges)
}


def get_degradation(name: str, **config: Any) -> Degradation:
    """The degradation of that name, e.g. `get_degradation("downsample", factor=4)`.

    Raises ValueError for an unknown name, or settings that it does not have.
    """
    return build_named(DEGRADATIONS, "degradation", name, config)


def luma(images: torch.Tensor) -> torch.Tensor:
    """Brightness (B, 1, H, W) of RGB images (B, 3, H, W), in their range."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))[:, None]
