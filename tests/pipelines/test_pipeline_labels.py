"""What users may pass as `class_labels`."""

import numpy as np
import pytest
import torch
from helpers import tiny_sit

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "great white shark, white shark", 3: "crane, hoist"}


def pipeline(cls=OneStepInterpolantPipeline, id2label=NAMES):
    return cls(tiny_sit(num_classes=5), StochasticInterpolantScheduler(), id2label=id2label)


@pytest.mark.parametrize("cls", [OneStepInterpolantPipeline, InterpolantPipeline])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (2, [2]),
        ("goldfish", [0]),
        ("Carassius auratus", [0]),
        ("goldfish, Carassius auratus", [0]),
        (" white shark ", [2]),
        ("crane", [1]),  # a whole name wins over a synonym
        ("hoist", [3]),
        ([4, "goldfish"], [4, 0]),
        ((1, 0), [1, 0]),
        (range(5), [0, 1, 2, 3, 4]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(3), [3]),
        (np.array([3, 1]), [3, 1]),
        ([np.int64(2), torch.tensor(4)], [2, 4]),
    ],
)
def test_labels_become_classes(cls, labels, classes):
    assert pipeline(cls).get_label_ids(labels) == classes


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (5, ValueError, "class 5 .*0 to 4"),
        (-1, ValueError, "class -1 .*0 to 4"),
        ([], ValueError, "empty"),
        ("goldfisch", ValueError, "'goldfisch'.*4 classes.*Did you mean 'goldfish'"),
        ("zzz", ValueError, "Unknown label 'zzz'.*4 classes.*'goldfish'"),
        (True, TypeError, "True of type bool"),
        (1.0, TypeError, "1.0 of type float"),
        (torch.tensor([1.0]), TypeError, "1.0 of type float"),
        (torch.tensor([True]), TypeError, "True of type bool"),
        (torch.tensor([[1, 2]]), TypeError, "flat list"),
        (None, ValueError, "5 classes: pass `class_labels`"),
    ],
)
def test_other_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        pipeline()(labels)


def test_a_name_of_two_classes_is_ambiguous():
    with pytest.raises(ValueError, match=r"'crane' is the name of several classes: 1, 3.*number"):
        pipeline(id2label={1: "crane", 3: "crane"}).get_label_ids("crane")


def test_names_need_an_id2label():
    with pytest.raises(ValueError, match=r"'goldfish' is a name.*no `id2label`.*0 to 4"):
        pipeline(id2label=None).get_label_ids("goldfish")


def test_keys_from_json_are_numbers_again():
    pipe = pipeline(id2label={"3": "three"})
    assert pipe.config.id2label == {3: "three"}
    assert pipe.get_label_ids("three") == [3]


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"x": "name"}, "'x'.*not the number"),
        ({9: "nine"}, "9: 'nine'.*0 to 4"),
        ({0: 5}, "0: 5.*to names"),
    ],
)
def test_an_id2label_must_map_classes_to_names(id2label, message):
    with pytest.raises(ValueError, match=message):
        pipeline(id2label=id2label)


def test_the_label_reaches_the_network():
    pipe = pipeline()
    noise = torch.randn(1, 1, 8, 8)
    by_number, by_name, other = (pipe(label, latents=noise, output_type="pt").images for label in (2, "white shark", 0))
    assert torch.equal(by_number, by_name)
    assert not torch.equal(by_number, other)
