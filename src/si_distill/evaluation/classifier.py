"""What an image shows, for label accuracy: an object with a `name`, and `predict` from uint8 images to classes."""

import numpy as np
import torch

from ..data import DataConfig, ImageDataset, load_images


class DigitsClassifier:
    """A support-vector classifier trained on all of scikit-learn's digits; names what a generated digit shows."""

    name = "scikit-learn SVC(gamma=0.02, C=10) on pixels of the 1,797 real digits"

    def __init__(self, images: torch.Tensor, labels: list[int]):
        from sklearn.svm import SVC

        self._classifier = SVC(gamma=0.02, C=10).fit(self._features(images), labels)

    @staticmethod
    def _features(images: torch.Tensor):
        return (images.flatten(1).double() / 127.5 - 1).numpy()

    def predict(self, images: torch.Tensor) -> np.ndarray:
        """The class (N,) that each of the uint8 images (N, 1, 8, 8) shows."""
        return self._classifier.predict(self._features(images))

    def accuracy(self, images: torch.Tensor, labels: list[int]) -> float:
        """Share of uint8 images (N, 1, 8, 8) that show their label."""
        return float((self.predict(images) == labels).mean())


def classifier_of(data: ImageDataset | None) -> DigitsClassifier | None:
    """What names the class of an image of this data set: of the digits, trained on all of them, also of a part."""
    is_digits = data is not None and data.name == "sklearn-digits" and data.class_names
    return DigitsClassifier(*load_images(DataConfig()).read_all()) if is_digits else None
