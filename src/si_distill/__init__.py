"""One-step students of diffusion, flow and bridge models: the public names."""

from .lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "interpolants": ("Interpolant", "get_interpolant"),
        "models.transformer_sit": ("SiTTransformer2DModel",),
        "objectives": ("DistillationObjective", "get_objective"),
        "pipelines.interpolant_condition": ("Condition",),
        "pipelines.interpolant_field": ("Field", "Guidance"),
        "pipelines.pipeline_interpolant": ("InterpolantPipeline",),
        "pipelines.pipeline_one_step_interpolant": ("OneStepInterpolantPipeline",),
        "schedulers.scheduling_stochastic_interpolant": ("StochasticInterpolantScheduler",),
    },
)
