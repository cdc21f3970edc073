"""Time reversal of a network, folded into its weights.

SiT and torchcfm have data at t = 1 and noise at t = 0; here it is the other way round. With s = 1 − t a network N of theirs
becomes one of ours by

    sample, noise, score:  M(x, t) =  N(x, 1 − t)
    velocity:              M(x, t) = −N(x, 1 − t),     because d/dt = −d/ds.
"""

import math

import torch


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """First layer of a time embedding for 1 − t.

    The embedding is cos(t f), then sin(t f), with frequencies f_i = 10000^(−i/F), i = 0 … F − 1 (Vaswani et al. 2017). With

        cos((1 − t) f) = cos f cos(t f) + sin f sin(t f)        sin((1 − t) f) = sin f cos(t f) − cos f sin(t f)

    the layer W = (W_c, W_s) acts on it as (W_c cos f + W_s sin f, W_c sin f − W_s cos f) does on that of t. This is its own
    inverse.

    Args:
        weight: (D, 2 F) of the layer, cosines first.

    Returns:
        (D, 2 F) in the dtype of `weight`, computed in float64.
    """
    half = weight.shape[1] // 2
    # The frequencies are rounded to float32, as in both networks.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).to(weight.dtype)
