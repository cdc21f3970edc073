from .interpolant_pipeline_base import guided_outputs
from .pipeline_interpolant import InterpolantPipeline
from .pipeline_one_step_interpolant import OneStepInterpolantPipeline

__all__ = ["InterpolantPipeline", "OneStepInterpolantPipeline", "guided_outputs"]
