"""Where a batch's reference images come from: the pair's own column, a degradation of the images, or a second data set."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from ..errors import InputError
from ..sample_noise import SampleNoise
from .batches import Batch, BatchIterator, TrainingData
from .config import DataConfig
from .degradations import Degradation

#: What makes the references of a batch: `source(batch, noise, *counters, indices=…)` is the batch with `reference`.
ReferenceSource = Callable[..., Batch]


def degraded(
    degradation: Degradation, batch: Batch, noise: SampleNoise, *counters: int, indices: Iterable[int]
) -> Batch:
    """The batch with the degraded image itself, `reference` = D(`images`), after cropping and flipping.

    The random numbers of a sample are those of (seed, counters, index), whatever the batch.
    """
    shape = (degradation.numbers,)
    u = noise.uniform("degradation", *counters, indices=indices, shape=shape) if degradation.numbers else None
    return {**batch, "reference": degradation(batch["images"], u)}


def transported(batch: Batch, noise: SampleNoise, *counters: int, indices: Iterable[int]) -> Batch:
    """The batch with unpaired references rearranged to lie near their images (minibatch optimal transport).

    Pooladian et al. 2023, "Multisample Flow Matching", section 3.1; Tong et al. 2024, "Improving and Generalizing Flow-Based
    Generative Models with Minibatch Optimal Transport", section 3.2: the coupling of the batch of THIS process and
    micro-batch, so its size matters. Both marginals stay what they were.
    """
    return {**batch, "reference": batch["reference"][optimal_assignment(batch["images"], batch["reference"])]}


def optimal_assignment(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """(B,) the number of the reference of each image in the pairing with the least Σ ‖image − reference‖², exactly.

    Args:
        images, references: (B, C, H, W).
    """
    cost = torch.cdist(images.flatten(1).double(), references.flatten(1).double()).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=images.device)


class UnpairedData:
    """Images, and references that are another data set: their order is independent, so any pair is as likely as any other.

    Args:
        images: the data set of the images, which has labels.
        references: the other; its labels are not read.
        further: whether each batch has a second, independent set of references, `other_reference`: what students start
            from, next to those that x_t is built with.

    Raises:
        InputError: when the two have images of different sizes or channels.
    """

    def __init__(self, images: TrainingData, references: TrainingData, further: bool = False):
        self.images, self.references, self.further = images, references, further
        self.name, self.channels, self.size = images.name, images.channels, images.size
        self.class_names, self.count = images.class_names, images.count
        check_same_channels(images, references)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int = 0, **position: int) -> "UnpairedBatches":
        """Endless batches of one rank (see `TrainingData.batches`)."""
        names = ("reference", "other_reference") if self.further else ("reference",)
        return UnpairedBatches(
            self.images.batches(batch_size, seed=seed, **position),
            # Another seed, or two data sets of the same length would be paired by their numbers.
            **{name: self.references.batches(batch_size, seed=seed + n, **position) for n, name in enumerate(names, 1)},
        )


def check_same_channels(images: TrainingData, references: TrainingData) -> None:
    """Refuses a data set of references with another number of channels than the images."""
    if images.channels != references.channels:
        raise InputError(
            f"The references ({references.name}) have {references.channels} channels and the images ({images.name}) "
            f"{images.channels}: a bridge needs the same of both."
        )


class UnpairedBatches:
    """Batches of several data sets side by side; the state is that of all.

    Args:
        images: gives the batch.
        references: whose images the batch gets under these names.
    """

    def __init__(self, images: BatchIterator, **references: BatchIterator):
        self._parts = {"images": images, **references}

    def __next__(self) -> Batch:
        batch = {**next(self._parts["images"])}
        return batch | {name: next(part)["images"] for name, part in self._parts.items() if name != "images"}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state and state[name])

    @property
    def counts(self) -> dict[str, int]:
        parts = [part.counts for part in self._parts.values()]
        return {name: sum(counts.get(name, 0) for counts in parts) for name in dict.fromkeys(chain(*parts))}


def reference_source(config: DataConfig) -> ReferenceSource | None:
    """What the trainer does to a batch for its references; None where the batch comes with them, or needs none."""
    degradation = config.build_degradation()
    if degradation is not None:
        return partial(degraded, degradation)
    return transported if config.coupling == "optimal_transport" else None


def references_config(config: DataConfig) -> DataConfig:
    """Settings of the second data set of unpaired references."""
    return replace(
        config,
        name=config.reference_name,
        config_name=None,
        data_files=config.reference_files,
        split=config.reference_split,
        image_column=config.reference_column,
        label_column="none",
        caption_column=None,
        reference_name=None,
        reference_files=None,
        reference_column=None,
        coupling="independent",
        max_train_samples=None,
    )
