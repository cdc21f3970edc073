"""Stochastic interpolants under their public name; the code is in `si_distill.schedulers.interpolant_paths`.

It lives there because a saved pipeline carries the scheduler's folder, and the formulas must travel with it.
"""

from .schedulers.interpolant_paths import (
    INTERPOLANTS,
    PREDICTIONS,
    Coefficients,
    DDPMInterpolant,
    EDMInterpolant,
    Interpolant,
    LinearInterpolant,
    TrigonometricInterpolant,
    VPInterpolant,
    get_interpolant,
)

__all__ = [
    "INTERPOLANTS",
    "PREDICTIONS",
    "Coefficients",
    "DDPMInterpolant",
    "EDMInterpolant",
    "Interpolant",
    "LinearInterpolant",
    "TrigonometricInterpolant",
    "VPInterpolant",
    "get_interpolant",
]
