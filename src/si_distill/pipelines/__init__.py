from .interpolant_latents import LatentScaling
from .interpolant_pipeline_network import NetworkView, guided_outputs, network_condition, view_network
from .pipeline_interpolant import InterpolantPipeline
from .pipeline_one_step_interpolant import OneStepInterpolantPipeline

__all__ = [
    "InterpolantPipeline",
    "LatentScaling",
    "NetworkView",
    "OneStepInterpolantPipeline",
    "guided_outputs",
    "network_condition",
    "view_network",
]
