"""Time reversal folded into the first layer of a time embedding."""

import pytest
import torch
from foreign_sit import sines

from si_distill.conversion.folding import reverse_time


@pytest.mark.parametrize("width", [8, 32, 256])
def test_the_layer_sees_one_minus_t(width):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(5, width, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    reversed_time = sines(t, width, cosine_first=True) @ reverse_time(weight).T
    # The frequencies are float32 numbers, as in the networks.
    torch.testing.assert_close(reversed_time, sines(1 - t, width, cosine_first=True) @ weight.T, rtol=0, atol=1e-6)
    assert (reversed_time - sines(t, width, cosine_first=True) @ weight.T).abs().max() > 0.1


def test_twice_is_nothing():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight, rtol=0, atol=1e-15)
    assert reverse_time(weight.float()).dtype == torch.float32
