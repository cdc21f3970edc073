"""Augmentation: labels say exactly what was done, and what they say is what happens."""

import math

import pytest
import torch

from si_distill.data.augmentation import AUGMENT_LABELS, AUGMENT_NUMBERS, Augmentation
from si_distill.sample_noise import SampleNoise

#: What an anisotropy of 2 grows by.
F = 2**0.4


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, AUGMENT_NUMBERS, generator=generator, dtype=torch.float64)


def transformation(count: int = 1, **changes) -> Augmentation:
    """None at all but for what is given."""
    off, zero = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64)
    fields = dict(flip_x=off, flip_y=off, scale=zero, angle=zero, anisotropy=zero, axis=zero, shift=zero.repeat(2, 1).T)
    given = {name: torch.as_tensor(value, dtype=fields[name].dtype) for name, value in changes.items()}
    return Augmentation(**{**fields, **{name: value.expand_as(fields[name]) for name, value in given.items()}})


def noise_images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def blob(x: float, y: float, wide: float = 0.16, high: float = 0.16, size: int = 64) -> torch.Tensor:
    """A Gaussian spot at (x, y) right and up of the centre, edges at ±1, on black."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1
    return torch.exp(-(((places - x) / wide) ** 2 + ((places[:, None] + y) / high) ** 2) / 2)[None, None]


@pytest.mark.parametrize("probability", [0.0, 0.12, 1.0])
def test_labels_are_zero_if_and_only_if_the_image_is_untouched(probability):
    images = noise_images(512)
    augmentation = Augmentation.draw(numbers(512), probability)
    labels, augmented = augmentation.labels, augmentation(images)
    assert labels.shape == (512, AUGMENT_LABELS)
    touched = (augmented != images).flatten(1).any(1)
    assert torch.equal(touched, (labels != 0).any(1))
    # What was only flipped is a rearrangement of the same values.
    flipped = ~labels[:, 2:].any(1)
    assert torch.equal(augmented[flipped].flatten(1).sort().values, images[flipped].flatten(1).sort().values)
    assert flipped.any() or probability == 1


def test_flips_are_exact_and_undo_themselves():
    images = noise_images(2)
    assert torch.equal(transformation(2, flip_x=True)(images), images.flip(3))
    assert torch.equal(transformation(2, flip_y=True)(images), images.flip(2))
    both = transformation(2, flip_x=True, flip_y=True)
    assert torch.equal(both(both(images)), images)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        (dict(angle=math.pi / 2), blob(0.5, 0), blob(0, 0.5)),  # counter-clockwise
        (dict(angle=math.pi), blob(0.3, 0.2), blob(-0.3, -0.2)),
        (dict(shift=[1.0, -2.0]), blob(0, 0), blob(0.25, 0.5)),  # right and up
        (dict(scale=5.0), blob(0.2, 0.1), blob(0.4, 0.2, 0.32, 0.32)),
        (dict(anisotropy=2.0), blob(0.2, 0.2), blob(0.2 * F, 0.2 / F, 0.16 * F, 0.16 / F)),
        (dict(anisotropy=2.0, axis=math.pi / 2), blob(0.2, 0.2), blob(0.2 / F, 0.2 * F, 0.16 / F, 0.16 * F)),
        (
            dict(scale=5.0, angle=math.pi / 2, shift=[0.0, 2.0]),
            blob(0.2, 0),
            blob(0, -0.1, 0.32, 0.32),
        ),  # in this order
    ],
)
def test_each_transformation_moves_a_spot_to_where_its_parameters_say(changes, before, after):
    assert (transformation(**changes)(before) - after).abs().max() < 0.015  # at the borders; 0.009 elsewhere


def test_images_are_mirrored_about_the_centres_of_the_outermost_pixels():
    image = torch.arange(64.0, dtype=torch.float64).view(1, 1, 8, 8)
    moved = transformation(shift=[2.0, 0.0])(image)[0, 0]  # two pixels to the right
    torch.testing.assert_close(moved, image[0, 0][:, [2, 1, 0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("changes", "back"),
    [
        (dict(angle=0.4), dict(angle=-0.4)),
        (dict(scale=0.8), dict(scale=-0.8)),
        (dict(anisotropy=1.1, axis=0.7), dict(anisotropy=-1.1, axis=0.7)),
        (dict(shift=[0.7, -1.3]), dict(shift=[-0.7, 1.3])),
    ],
)
def test_the_opposite_transformation_brings_the_image_back(changes, back):
    image = blob(0.1, -0.2, 0.2, 0.15)
    assert (transformation(**changes)(image) - image).abs().max() > 0.1
    assert (transformation(**back)(transformation(**changes)(image)) - image).abs().max() < 0.03


def test_labels_have_the_rates_and_spreads_of_edm():
    probability, count = 0.12, 40_000
    labels = Augmentation.draw(numbers(count), probability).labels
    rates = (labels != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.06, *[probability] * 7], dtype=torch.float64)
    expected[6] = probability / 2  # the axis is the row in half of the cases
    assert (rates - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    spread = [column[column != 0].square().mean() for column in labels.T[2:]]
    # Normal scale, anisotropy split over its axis, and shift; of a uniform angle E[(cos - 1)²] = 3/2 and E[sin²] = 1/2.
    wanted = torch.tensor([1, 1.5, 0.5, 0.75, 0.5, 1, 1], dtype=torch.float64)
    assert torch.stack(spread) == pytest.approx(wanted, rel=0.1)


def test_a_transformation_belongs_to_its_sample():
    noise = SampleNoise(seed=3)

    def augmented(indices: range) -> torch.Tensor:
        drawn = noise.normal((AUGMENT_NUMBERS,), "augmentation", 7, 0, indices=indices)
        images = noise.normal((1, 8, 8), "samples", indices=indices)
        return Augmentation.draw(drawn, 0.5)(images)

    whole = augmented(range(16))
    assert torch.equal(torch.cat([augmented(range(8)), augmented(range(8, 16))]), whole)
    assert torch.equal(augmented(range(16)), whole)
