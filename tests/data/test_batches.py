"""Batches: dicts on the device, flips that belong to samples."""

import torch
from trainer_builders import teaching

from si_distill.data import DataConfig, load_images
from si_distill.data.batches import flipped, on_device


def test_levels_become_the_values_that_items_have():
    data = load_images(DataConfig())
    batch = on_device({"images": torch.stack([data.read(n) for n in range(3)]), "labels": torch.arange(3)}, "cpu")
    assert torch.equal(batch["images"], torch.stack([data[n]["images"] for n in range(3)]))
    assert torch.equal(batch["labels"], torch.arange(3))


def test_a_pair_is_flipped_together_and_labels_stay():
    generator = torch.Generator().manual_seed(0)
    batch = {
        "images": torch.randn(3, 1, 2, 4, generator=generator),
        "reference": torch.randn(3, 2, 2, 4, generator=generator),
        "labels": torch.arange(3),
    }
    turned = flipped(batch, torch.tensor([True, False, True]))
    for name in ("images", "reference"):
        for n, expected in enumerate((batch[name][0].flip(-1), batch[name][1], batch[name][2].flip(-1))):
            assert torch.equal(turned[name][n], expected)
    assert torch.equal(turned["labels"], batch["labels"])


def test_random_flips_are_a_function_of_the_step(tmp_path):
    """Half of the images, others in each step, and the same in a trainer that starts later."""
    arguments = ["--per_device_train_batch_size", 64, "--gradient_accumulation_steps", 2]
    plain = teaching(tmp_path / "plain", *arguments)
    trainer = teaching(tmp_path / "flips", *arguments, "--data.random_flip", "true")
    later = teaching(tmp_path / "later", *arguments, "--data.random_flip", "true")
    later.step = 1
    masks = []
    for step in range(2):
        plain.step = trainer.step = step
        for micro_batch in range(2):
            straight, batch = (t.next_batch(t.data, micro_batch) for t in (plain, trainer))
            turned = (batch["images"] == straight["images"].flip(-1)).all((1, 2, 3))
            same = (batch["images"] == straight["images"]).all((1, 2, 3))
            assert (turned ^ same).all()  # no image of the digits is its own mirror image
            assert torch.equal(batch["labels"], straight["labels"])
            masks.append(turned)
            if step == 1:
                assert torch.equal(later.next_batch(later.data, micro_batch)["images"], batch["images"])
    assert 0.4 < torch.cat(masks).float().mean() < 0.6
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
