"""Stochastic interpolants under their public name: the code is in `schedulers/interpolant_{base,paths,bridge}.py`.

It lives there because a saved pipeline carries the scheduler's folder, and the formulas must travel with it.
"""

from .schedulers.interpolant_base import Coefficients, Interpolant
from .schedulers.interpolant_bridge import BridgeInterpolant
from .schedulers.interpolant_names import PREDICTIONS, TIMESTEP_TYPES
from .schedulers.interpolant_paths import (
    GAUSSIAN_INTERPOLANTS,
    INTERPOLANTS,
    EDMInterpolant,
    VPInterpolant,
    get_interpolant,
    register_interpolant,
)

__all__ = [
    "GAUSSIAN_INTERPOLANTS",
    "INTERPOLANTS",
    "PREDICTIONS",
    "TIMESTEP_TYPES",
    "BridgeInterpolant",
    "Coefficients",
    "EDMInterpolant",
    "Interpolant",
    "VPInterpolant",
    "get_interpolant",
    "register_interpolant",
]
