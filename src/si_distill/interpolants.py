"""Stochastic interpolants under their public name: the code is in `schedulers/interpolant_base.py` and `…_paths.py`.

It lives there because a saved pipeline carries the scheduler's folder, and the formulas must travel with it.
"""

from .schedulers.interpolant_base import PREDICTIONS, TIMESTEP_TYPES, Coefficients, Interpolant
from .schedulers.interpolant_paths import (
    INTERPOLANTS,
    DDPMInterpolant,
    EDMInterpolant,
    LinearInterpolant,
    TrigonometricInterpolant,
    VPInterpolant,
    get_interpolant,
)

__all__ = [
    "INTERPOLANTS",
    "PREDICTIONS",
    "TIMESTEP_TYPES",
    "Coefficients",
    "DDPMInterpolant",
    "EDMInterpolant",
    "Interpolant",
    "LinearInterpolant",
    "TrigonometricInterpolant",
    "VPInterpolant",
    "get_interpolant",
]
