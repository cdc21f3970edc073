"""One-step students of diffusion, flow and bridge models: the public names."""

from .lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "evaluation.metrics": ("register_metric",),
        "interpolants": ("Interpolant", "get_interpolant", "register_interpolant"),
        "loading": ("load_pipeline",),
        "models.transformer_sit": ("SiTTransformer2DModel",),
        "objectives": ("DistillationObjective", "get_objective", "register_preset"),
        "pipelines.interpolant_condition": ("Condition",),
        "pipelines.interpolant_field": ("Field", "Guidance"),
        "pipelines.interpolant_pipeline_network": ("view_network",),
        "pipelines.pipeline_interpolant": ("InterpolantPipeline",),
        "pipelines.pipeline_one_step_interpolant": ("OneStepInterpolantPipeline",),
        "sample_noise": ("SampleNoise",),
        "schedulers.scheduling_stochastic_interpolant": ("StochasticInterpolantScheduler",),
    },
)
