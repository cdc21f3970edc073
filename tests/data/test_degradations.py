"""Degradations: shapes, ranges, what they keep, and what they do to known images."""

import numpy as np
import pytest
import torch
from PIL import Image

from si_distill.data import DataConfig
from si_distill.data.degradations import DEGRADATIONS, get_degradation
from si_distill.errors import InputError

SETTINGS = {
    "downsample": ("downsample", dict(factor=4)),
    "downsample-bicubic": ("downsample", dict(factor=2, filter="bicubic", upsample="bicubic")),
    "inpaint": ("inpaint", {}),
    "inpaint-random": ("inpaint", dict(mask="random", min_side=0.1, max_side=0.9)),
    "inpaint-left": ("inpaint", dict(mask="left")),
    "blur": ("blur", dict(sigma=1.5)),
    "greyscale": ("greyscale", {}),
    "jpeg": ("jpeg", {}),
    "edges": ("edges", dict(gain=2.0)),
}
every_degradation = pytest.mark.parametrize(("name", "config"), SETTINGS.values(), ids=SETTINGS)


def images(count: int = 4, channels: int = 3, size: int = 16, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def numbers(degradation, count: int = 4) -> torch.Tensor | None:
    wanted = degradation.numbers
    return torch.rand(count, wanted, generator=torch.Generator().manual_seed(1)) if wanted else None


def test_every_degradation_is_tested():
    assert {name for name, _ in SETTINGS.values()} == set(DEGRADATIONS)


@every_degradation
def test_the_result_is_an_image_like_the_given_one(name, config):
    degradation, x = get_degradation(name, **config), images()
    u, before = numbers(degradation), x.clone()
    done = degradation(x, u)
    assert (done.shape, done.dtype) == (x.shape, x.dtype)
    assert -1 <= done.min()
    assert done.max() <= 1
    assert not torch.equal(done, x)
    assert torch.equal(x, before)
    assert torch.equal(degradation(x, u), done)
    # Sample by sample: no image sees the others of its batch.
    alone = [degradation(x[i : i + 1], None if u is None else u[i : i + 1]) for i in range(len(x))]
    assert torch.allclose(torch.cat(alone), done, atol=1e-12)


@pytest.mark.parametrize("key", [key for key in SETTINGS if key not in ("inpaint-random", "inpaint-left")])
def test_a_flip_before_is_a_flip_afterwards(key):
    name, config = SETTINGS[key]
    degradation, x = get_degradation(name, **config), images()
    found, wanted = degradation(x.flip(-1)), degradation(x).flip(-1)
    # JPEG rounds coefficients, whose signs a flip turns, and levels afterwards.
    assert (found - wanted).abs().max() < (0.1 if name == "jpeg" else 1e-12)


@pytest.mark.parametrize("key", ["downsample", "inpaint", "inpaint-random", "inpaint-left", "greyscale"])
def test_projections_done_twice_are_done_once(key):
    name, config = SETTINGS[key]
    degradation, x = get_degradation(name, **config), images()
    u = numbers(degradation)
    once = degradation(x, u)
    assert torch.allclose(degradation(once, u), once, atol=1e-12)


def test_pooling_keeps_the_mean_of_every_block():
    x = images()
    small = get_degradation("downsample", factor=4).small(x)
    assert torch.allclose(small[1, 2, 0, 3], x[1, 2, :4, 12:].mean())
    assert torch.equal(get_degradation("downsample", factor=4)(x)[1, 2, :4, 12:], small[1, 2, 0, 3].expand(4, 4))


def test_holes_have_the_sides_that_were_asked_for():
    x, u = images(1000), torch.rand(1000, 4, generator=torch.Generator().manual_seed(2))
    center = get_degradation("inpaint", max_side=0.5).hole(x)[0, 0]
    assert center[4:12, 4:12].all()
    assert center.sum() == 64
    left = get_degradation("inpaint", mask="left").hole(x)[0, 0]
    assert left[:, :8].all()
    assert left.sum() == 128
    random = get_degradation("inpaint", mask="random", min_side=0.25, max_side=0.5)
    holes = random.hole(x, u)[:, 0]
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(heights * widths, holes.sum((1, 2)))  # rectangles
    for sides in (heights, widths):
        assert sides.min() >= 4
        assert sides.max() <= 8
        assert len(sides.unique()) == 5
    assert holes.any(0).all()  # no place is safe
    assert torch.equal(random(x, u) == 0, holes[:, None].expand_as(x))


def test_a_blurred_point_is_a_gaussian():
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[..., 7, 7] = 1
    blurred = get_degradation("blur", sigma=1.0)(x)[0, 0]
    places = torch.arange(-3, 4, dtype=torch.float64)
    assert torch.allclose(blurred[7, 4:11] / blurred[7, 7], torch.exp(-0.5 * places**2))
    assert blurred.sum() == pytest.approx(1)
    assert torch.allclose(get_degradation("blur", sigma=2.0)(torch.full_like(x, 0.3)), torch.full_like(x, 0.3))


def test_grey_is_the_brightness_that_pil_has():
    levels = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey = get_degradation("greyscale")(levels.double() / 127.5 - 1)
    pil = np.asarray(Image.fromarray(levels[0].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs((grey[0, 0].numpy() + 1) * 127.5 - pil).max() < 1
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_edges_are_white_on_black_where_brightness_steps():
    x = torch.full((1, 3, 8, 8), -1.0)
    x[..., 4:] = 1.0
    edges = get_degradation("edges")(x)[0, 0]
    assert torch.equal(edges[:, 3:5], torch.ones(8, 2))
    assert torch.equal(edges[:, :3], -torch.ones(8, 3))


def test_a_lower_quality_is_further_from_the_image():
    x = images(1, 3, 32)
    errors = [(get_degradation("jpeg", quality=quality)(x) - x).square().mean() for quality in (5, 40, 95)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("name", "config", "size", "channels", "words"),
    [
        ("downsample", dict(factor=3), 8, 1, "`factor` 3 does not divide the size 8"),
        ("downsample", dict(factor=1), 8, 1, "`factor` must be a whole number of at least 2"),
        ("downsample", dict(filter="mean"), 8, 1, "`filter` is 'mean'; choose one of: pool, bicubic"),
        ("downsample", dict(scale=3), 8, 1, "has no setting `scale`; it has factor, filter, upsample"),
        ("inpaint", dict(mask="round"), 8, 1, "`mask` is 'round'"),
        ("inpaint", dict(min_side=0.8), 8, 1, "0 < min_side <= max_side < 1"),
        ("blur", dict(sigma=3.0), 8, 1, "needs 9 mirrored pixels and the images have 8"),
        ("blur", dict(sigma=0), 8, 1, "`sigma` must be a positive number"),
        ("greyscale", {}, 8, 1, "images of 1 channel have no colours to lose"),
        ("greyscale", dict(weight=1), 8, 3, "has no setting `weight`; it has none at all"),
        ("jpeg", dict(quality=0), 8, 1, "`quality` must be a whole number from 1 to 95"),
        ("jpeg", {}, 8, 4, "a JPEG has 1 or 3 channels"),
        ("edges", dict(gain=-1.0), 8, 1, "`gain` must be a positive number"),
        ("edges", {}, 8, 4, "edges are those of 1 or 3 channels"),
    ],
)
def test_what_cannot_be_done_is_said(name, config, size, channels, words):
    def build():
        settings = DataConfig(degradation=name, degradation_kwargs=config, image_size=size)
        settings.build_degradation().check_channels(channels)

    with pytest.raises((InputError, ValueError), match=words):
        build()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Choose one of: downsample, inpaint, blur, greyscale, jpeg, edges"):
        get_degradation("sepia")
