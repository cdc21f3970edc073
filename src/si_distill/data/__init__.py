from .batches import TrainingData
from .config import DataConfig
from .sampler import GlobalBatchSampler
from .sources import ImageDataset, load_images
from .stream import ImageStream, load_training_data

__all__ = [
    "DataConfig",
    "GlobalBatchSampler",
    "ImageDataset",
    "ImageStream",
    "TrainingData",
    "load_images",
    "load_training_data",
]
