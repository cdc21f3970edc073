"""One-step students of diffusion, flow and bridge models: the public names."""

from .interpolants import Interpolant, get_interpolant
from .models.transformer_sit import SiTTransformer2DModel
from .objectives import DistillationObjective, get_objective
from .pipelines.pipeline_interpolant import InterpolantPipeline
from .pipelines.pipeline_one_step_interpolant import OneStepInterpolantPipeline
from .schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler

__version__ = "0.1.0"

__all__ = [
    "DistillationObjective",
    "Interpolant",
    "InterpolantPipeline",
    "OneStepInterpolantPipeline",
    "SiTTransformer2DModel",
    "StochasticInterpolantScheduler",
    "get_interpolant",
    "get_objective",
]
