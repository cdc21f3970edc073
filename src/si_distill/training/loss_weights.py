"""Weights of the regression of noise and score networks (Ma et al. 2024, SiT, section 3 and its public training code)."""

import torch

from ..interpolants import Coefficients


def regression_weight(name: str, c: Coefficients, prediction_type: str) -> torch.Tensor:
    """Factor of the squared error of a network's own prediction, in the shape of the times.

    With x̂1 − x1 for the error of the noise, and −β times that of the score, D = α β' − α' β and v − İ = (D / α)(x̂1 − x1):

    * `none`: ‖x̂1 − x1‖², that is β² for a score network and 1 for any other prediction;
    * `velocity`: the velocity's own loss, ‖v − İ‖² = (D / α)² ‖x̂1 − x1‖²;
    * `likelihood`: ½ g² of the diffusion with these marginals, ½ g² = β D / α, times the error of the score:
      D / (α β) ‖x̂1 − x1‖², which bounds the likelihood (Song et al. 2021, "Maximum Likelihood Training of Score-Based
      Diffusion Models").

    Args:
        name: one of `si_distill.choices.LOSS_WEIGHTS`; another one than `none` is for `epsilon` and `score`.
        c: coefficients at the times.
        prediction_type: what the network predicts.
    """
    own = c.beta**2 if prediction_type == "score" else torch.ones_like(c.beta)
    match name:
        case "none":
            return own
        case "velocity":
            return own * (c.determinant / c.alpha) ** 2
        case _:
            return own * c.determinant / (c.alpha * c.beta)
