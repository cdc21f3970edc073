"""What networks are told: one object whose rows stay together."""

import torch

from si_distill import Condition

TOLD = Condition(
    labels=torch.tensor([0, 1, 2]),
    text={"states": torch.arange(12.0).view(3, 2, 2), "pooled": torch.arange(3.0).view(3, 1)},
    image=torch.arange(3.0).view(3, 1, 1, 1),
    augment=torch.ones(3, 2),
    guidance=torch.tensor([1.0, 2.0, 3.0]),
)
NULL = Condition(torch.tensor([9]), {"states": torch.full((1, 2, 2), -1.0), "pooled": torch.zeros(1, 1)})


def values(condition):
    return [condition.labels, *condition.text.values(), condition.image, condition.augment, condition.guidance]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def test_rows_are_taken_and_put_together_again():
    parts = [TOLD[:1], TOLD[torch.tensor([1, 2])]]
    assert same(Condition.cat(*parts), TOLD)
    assert not same(Condition.cat(*reversed(parts)), TOLD)
    assert same(
        TOLD.map(lambda value: value.double()).map(lambda value: value.to(torch.float32)), TOLD.map(torch.Tensor.float)
    )


def test_what_is_not_told_stays_untold():
    untold = Condition.cat(Condition(), Condition())
    assert (untold.labels, untold.text, untold.image, untold.augment, untold.guidance) == (None, {}, None, None, None)
    assert Condition().nulled(NULL).labels is None


def test_class_and_text_are_nulled_together_where_it_is_said():
    where = torch.tensor([True, False, True])
    nulled = TOLD.nulled(NULL, where)
    assert nulled.labels.tolist() == [9, 1, 9]
    assert torch.equal(nulled.text["states"][where], torch.full((2, 2, 2), -1.0))
    assert torch.equal(nulled.text["states"][1], TOLD.text["states"][1])
    assert nulled.image is TOLD.image
    assert nulled.guidance is TOLD.guidance
    assert TOLD.nulled(NULL).labels.tolist() == [9, 9, 9]
    assert nulled.labels.dtype == torch.int64
