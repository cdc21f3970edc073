from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "interpolant_condition": ("Condition",),
        "interpolant_field": ("Field", "Guidance"),
        "interpolant_latents": ("LatentScaling",),
        "interpolant_pipeline_network": ("NetworkView", "view_network"),
        "pipeline_interpolant": ("InterpolantPipeline",),
        "pipeline_one_step_interpolant": ("OneStepInterpolantPipeline",),
    },
)
