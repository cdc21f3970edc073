"""Random numbers that belong to a sample, not to a process.

Every number of training is drawn from a generator seeded by (seed, stream, iteration, sub-step, GLOBAL sample index).
Nothing has to be saved to resume exactly, and two processes with half of the batch each draw what one process draws.
"""

import hashlib
import math
import struct
from collections.abc import Iterable

import torch

#: What the numbers are for; part of the seed, so that no two uses share numbers.
STREAMS = (
    "teacher",
    "augmentation",
    "flip",
    "latents",
    "degradation",
    "labels",
    "student_label_dropout",
    "generator_noise",
    "fresh_labels",
    "fresh_noise",
    "levels",
    "renoise",
    "critic",
    "critic_adversarial",
    "critic_adversarial_real",
    "generator",
    "generator_adversarial",
    "flow_map",
    "flow_map_start",
    "dropout",
    "samples",
    "evaluation",
    "likelihood",
)


def sample_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed from integers, by hashing: nearby counters give unrelated seeds."""
    if stream not in STREAMS:
        raise ValueError(f"Unknown stream {stream!r} of random numbers: {', '.join(STREAMS)}.")
    numbers = struct.pack(f"<{1 + len(counters)}q", seed, *counters)
    digest = hashlib.blake2b(numbers + stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


class SampleNoise:
    """Draws the random numbers of a slice of the global batch.

    Args:
        seed: the run's seed.
        device: where the tensors go. They are drawn on the CPU, so that the device does not change them.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.seed = seed
        self.device = torch.device(device)
        self._generator = torch.Generator()

    def _draw(self, draw, stream: str, counters: tuple[int, ...], indices: Iterable[int]) -> torch.Tensor:
        values = []
        for index in indices:
            self._generator.manual_seed(sample_seed(self.seed, stream, *counters, index))
            values.append(draw(self._generator))
        return torch.stack(values)

    def normal(self, shape: tuple[int, ...], stream: str, *counters: int, indices: Iterable[int]) -> torch.Tensor:
        """Standard normal numbers of shape (len(indices), *shape), float32."""
        return self._draw(lambda g: torch.randn(shape, generator=g), stream, counters, indices).to(self.device)

    def uniform_and_normal(
        self, shape: tuple[int, ...], stream: str, *counters: int, indices: Iterable[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One uniform number per sample, (B,), and normal numbers (B, *shape): a time's u, and x1."""

        def both(generator: torch.Generator) -> torch.Tensor:
            u = torch.rand((1,), generator=generator)
            return torch.cat([u, torch.randn(math.prod(shape), generator=generator)])

        flat = self._draw(both, stream, counters, indices).to(self.device)
        return flat[:, 0], flat[:, 1:].unflatten(1, shape)

    def integers(self, high: int, stream: str, *counters: int, indices: Iterable[int]) -> torch.Tensor:
        """Integers in [0, high), (len(indices),)."""
        return self._draw(lambda g: torch.randint(high, (), generator=g), stream, counters, indices).to(self.device)

    def uniform(self, stream: str, *counters: int, indices: Iterable[int], shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers in [0, 1), (len(indices), *shape)."""
        return self._draw(lambda g: torch.rand(shape, generator=g), stream, counters, indices).to(self.device)
