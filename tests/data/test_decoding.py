"""Decoding and ADM's crop: sizes, modes, and files that are no images."""

import io
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from si_distill.data.decoding import UnreadableImage, centre_crop, decode, is_grey, to_pixels


def stored(image: Image.Image, format: str = "PNG", **how) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return {"bytes": buffer.getvalue(), "path": None}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_image_of_the_size_is_not_touched():
    image = picture(8, 8)
    assert np.array_equal(np.asarray(centre_crop(image, 8)), np.asarray(image))
    wide = picture(8, 13)  # the shorter side has the size: only cut, from (13 − 8) // 2
    assert np.array_equal(np.asarray(centre_crop(wide, 8)), np.asarray(wide)[:, 2:10])


def test_a_height_and_a_width_are_the_middle_of_the_smallest_image_that_covers_them():
    image = picture(8, 13)
    assert np.array_equal(np.asarray(centre_crop(image, (8, 8))), np.asarray(centre_crop(image, 8)))
    assert np.array_equal(np.asarray(centre_crop(image, (6, 13))), np.asarray(image)[1:7])
    assert np.array_equal(np.asarray(centre_crop(image, (8, 11))), np.asarray(image)[:, 1:12])
    halved = np.asarray(image.resize((6, 4), Image.Resampling.BOX))
    assert np.array_equal(np.asarray(centre_crop(picture(8, 13), (4, 6))), halved)
    assert to_pixels(picture(70, 40), 3, (24, 32)).shape == (3, 24, 32)
    assert to_pixels(picture(5, 300), 1, (64, 8)).shape == (1, 64, 8)


def test_halving_averages_two_by_two_pixels_before_anything_else():
    image = picture(16, 24)
    means = np.asarray(image, dtype=np.float64).reshape(8, 2, 12, 2, 3).mean((1, 3))
    found = np.asarray(centre_crop(image, 8), dtype=np.float64)
    assert np.abs(found - means[:, 2:10]).max() <= 1  # rounded after each of the two directions
    # Four times: halved twice. Bicubic at once would overshoot the range of these two values.
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, 16:] = 200
    assert set(np.unique(np.asarray(centre_crop(Image.fromarray(stripes), 8)))) == {0, 200}


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (63, 64), (640, 70), (257, 256), (1, 3), (31, 9)]
)
@pytest.mark.parametrize("size", [8, 32])
def test_any_shape_becomes_the_square_in_the_middle(width, height, size):
    """A linear ramp along the longer side, whose middle stays in the middle."""
    ramp = np.linspace(0, 250, max(width, height)).astype(np.uint8)
    pixels = np.tile(ramp, (min(width, height), 1)) if width >= height else np.tile(ramp[:, None], (1, width))
    found = to_pixels(Image.fromarray(pixels), 1, size)
    assert found.shape == (1, size, size)
    along = found[0].float().mean(0 if width >= height else 1)
    step = 250 / max(width, height) * max(1, min(width, height) / size)
    assert abs(along.mean().item() - 125) <= 2 + step
    assert (along.diff() >= -1).all()


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 2000), (600, 40_000)])
def test_a_strip_is_cropped_before_it_grows(shape):
    """A ramp along the strip: what comes out is its middle, and no picture on the way is much larger than what goes in."""
    height, width = shape
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    strip = np.tile(ramp, (height, 1)) if width > height else np.tile(ramp[:, None], (1, width))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = to_pixels(Image.fromarray(strip), 3, 256)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.shape == (3, 256, 256)
    assert abs(found.float().mean() - 127) <= 2
    assert grown < 300_000  # KiB; it was 1.3 GiB


def test_every_mode_becomes_rgb_or_grey():
    colour = Image.new("RGB", (6, 6), (200, 40, 90))
    for image, how in (
        (colour.quantize(4), {}),
        (colour.convert("RGBA"), {}),
        (colour.convert("CMYK"), dict(format="TIFF")),
        (colour.convert("CMYK"), dict(format="JPEG", quality=100)),
    ):
        pixels = to_pixels(decode(stored(image, **how)), 3, 6).float()
        expected = torch.tensor([200.0, 40.0, 90.0])[:, None, None]
        assert (pixels - expected).abs().max() <= 4, image.mode
    grey = Image.new("L", (6, 6), 77)
    for mode in ("L", "LA"):
        assert (to_pixels(decode(stored(grey.convert(mode))), 3, 6) == 77).all()
        assert is_grey(decode(stored(grey.convert(mode))))
    assert set(to_pixels(decode(stored(grey.convert("1"))), 1, 6).unique().tolist()) <= {0, 255}
    assert not is_grey(decode(stored(colour.convert("P"))))


def test_sixteen_bits_are_scaled_and_not_cut_off():
    levels = (np.arange(36, dtype=np.uint16) * 1820).reshape(6, 6)
    for channels in (1, 3):
        pixels = to_pixels(decode(stored(Image.fromarray(levels))), channels, 6)
        assert np.array_equal(pixels[0].numpy(), levels >> 8)
        assert (pixels == pixels[:1]).all()
    with pytest.raises(UnreadableImage, match="no known range"):
        to_pixels(decode(stored(Image.fromarray(np.ones((6, 6), np.float32)), "TIFF")), 1, 6)


def test_orientation_in_exif_is_left_alone():
    image = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    turned = decode(stored(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.asarray(image))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_damaged_files_are_unreadable_whatever_the_library_raises(format):
    whole = stored(picture(40, 40), format)["bytes"]
    for content in (whole[: len(whole) // 2], b"", b"no image", whole[:20], None):
        with pytest.raises(UnreadableImage):
            decode({"bytes": content, "path": None})


def test_files_are_read_by_their_paths(tmp_path):
    picture(5, 5).save(tmp_path / "a.png")
    found = decode({"bytes": None, "path": str(tmp_path / "a.png")})
    assert np.array_equal(np.asarray(found), np.asarray(picture(5, 5)))
    with pytest.raises(UnreadableImage, match="is no file"):
        decode({"bytes": None, "path": str(tmp_path / "b.png")})


def test_a_row_that_names_a_device_is_unreadable():
    with pytest.raises(UnreadableImage, match="/dev/zero is no file"):
        decode({"bytes": None, "path": "/dev/zero"})
