"""Metrics between two sets of images, computed by torch-fidelity, and label accuracy."""

import torch
import torch_fidelity
from torch.utils.data import Dataset

from .features import PIXELS


class _Images(Dataset):
    """torch-fidelity's input: bare uint8 tensors (C, H, W)."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def frechet_distance(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Fréchet distance between two sets of images on pixel features (`si_distill.evaluation.features`).

    Not an FID: that name belongs to Inception features.

    Args:
        images, reference: (N, C, H, W) and (M, C, H, W), uint8, at least 2 each.
    """
    for name, value in (("images", images), ("reference", reference)):
        if value.dtype != torch.uint8 or value.ndim != 4 or len(value) < 2:
            raise ValueError(
                f"`{name}` must be at least two uint8 images (N, C, H, W), got {value.dtype} {tuple(value.shape)}."
            )
    result = torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(reference),
        fid=True,
        feature_extractor=PIXELS,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        batch_size=256,
        cache=False,
    )
    return float(result["frechet_inception_distance"])


class DigitsClassifier:
    """A support-vector classifier trained on all of scikit-learn's digits; names what a generated digit shows."""

    name = "scikit-learn SVC(gamma=0.02, C=10) on pixels of the 1,797 real digits"

    def __init__(self, images: torch.Tensor, labels: list[int]):
        from sklearn.svm import SVC

        self._classifier = SVC(gamma=0.02, C=10).fit(self._features(images), labels)

    @staticmethod
    def _features(images: torch.Tensor):
        return (images.flatten(1).double() / 127.5 - 1).numpy()

    def accuracy(self, images: torch.Tensor, labels: list[int]) -> float:
        """Share of uint8 images (N, 1, 8, 8) that show their label."""
        return float((self._classifier.predict(self._features(images)) == labels).mean())
