from ..lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "batches": ("TrainingData",),
        "config": ("DataConfig",),
        "loading": ("load_training_data",),
        "sampler": ("GlobalBatchSampler",),
        "sources": ("ImageDataset", "load_images"),
        "stream": ("ImageStream",),
    },
)
