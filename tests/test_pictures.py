"""A picture is the same to training, evaluation, generation and pipelines, in whatever form it is stored."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from si_distill.data.decoding import decode, to_pixels
from si_distill.evaluation.samples import FileSource
from si_distill.pipelines.interpolant_pipeline_images import read_images
from si_distill.sampling import open_images

SIZE = 6
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
GREY = COLOURS.convert("L")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    return exif


def transparent() -> Image.Image:
    image = COLOURS.convert("RGBA")
    image.putalpha(GREY)
    return image


#: Pictures, what their pixels are, and how they are stored.
FORMS = {
    "16-bit grey": (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), GREY, {}),
    "16-bit grey TIFF": (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), GREY, {"format": "TIFF"}),
    "32-bit grey": (Image.fromarray(np.asarray(GREY).astype(np.int32) * 257), GREY, {"format": "TIFF"}),
    "grey": (GREY, GREY, {}),
    "grey with transparency": (GREY.convert("LA"), GREY, {}),
    "black and white": (GREY.convert("1"), GREY.convert("1").convert("L"), {}),
    "colours": (COLOURS, COLOURS, {}),
    "palette": (COLOURS.quantize(256), COLOURS.quantize(256).convert("RGB"), {}),
    "transparency": (transparent(), COLOURS, {}),
    "CMYK": (COLOURS.convert("CMYK"), COLOURS.convert("CMYK").convert("RGB"), {"format": "TIFF"}),
    "turned by EXIF": (COLOURS, COLOURS, {"exif": turned()}),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_one_conversion_everywhere(form, channels, tmp_path):
    image, meant, how = FORMS[form]
    file = tmp_path / "image.png"
    image.save(file, **{"format": "PNG", **how})
    wanted = np.asarray(meant.convert("L" if channels == 1 else "RGB")).reshape(SIZE, SIZE, channels)
    wanted = torch.from_numpy(wanted.copy()).permute(2, 0, 1)
    with Image.open(file) as opened:
        found = {
            "training": to_pixels(decode({"bytes": None, "path": str(file)}), channels, SIZE),
            "pipeline": (read_images(opened, channels)[0] + 1) * 127.5,
            "evaluation": FileSource(str(tmp_path), channels).read([0]).images[0],
            "generation": torch.from_numpy(np.array(open_images([str(file)], channels)[0])).view(SIZE, SIZE, channels)
            .permute(2, 0, 1),
        }  # fmt: skip
    for where, pixels in found.items():
        torch.testing.assert_close(
            pixels.float(), wanted.float(), atol=1e-4, rtol=0, msg=lambda m, w=where: f"{w}: {m}"
        )


def test_pixels_without_a_range_are_refused_everywhere(tmp_path):
    file = tmp_path / "image.tiff"
    Image.fromarray(np.ones((SIZE, SIZE), np.float32)).save(file)
    with pytest.raises(ValueError, match="no known range"):
        to_pixels(decode({"bytes": None, "path": str(file)}), 3, SIZE)
    with pytest.raises(ValueError, match="no known range"):
        open_images([str(file)], 3)
    with Image.open(file) as image, pytest.raises(ValueError, match=r"`image` cannot be used: .*no known range"):
        read_images(image, 3)


def test_a_file_that_is_cut_short_is_a_sentence(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="`image` cannot be used"):
        read_images(image, 1)
    for read in (lambda: open_images([str(tmp_path / "cut.png")], 1), lambda: FileSource(str(tmp_path), 1)):
        with pytest.raises(ValueError, match="cannot be read"):
            read()


SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
ARRAYS = arrays.arrays(arrays.scalar_dtypes() | st.sampled_from(["f2", "f8", "u2", "O", "U3"]), SHAPES)
MODES = st.sampled_from(
    ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "I;16", "La"]
)
PICTURES = st.builds(Image.new, MODES, st.tuples(st.integers(0, 4), st.integers(0, 4)))
ANYTHING = ARRAYS | PICTURES | st.none() | st.integers() | st.text() | st.binary()


@given(ANYTHING | st.lists(ANYTHING, max_size=3), st.sampled_from([1, 3]))
@settings(max_examples=300, deadline=None)
def test_whatever_is_given_is_images_or_a_sentence(image, channels):
    try:
        found = read_images(image, channels)
    except (ValueError, TypeError) as error:
        said = str(error)
    else:
        assert found.isfinite().all()
        assert found.abs().max() <= 1.002
        said = "`image` was read"
    assert "`image`" in said
