#!/usr/bin/env python
r"""Trains the judge of generated Fashion-MNIST images: a small classifier, whose penultimate features give distances.

    python benchmarks/fashion_mnist_judge.py --data path/to/fashion-mnist --output runs/judge

The folder of the data holds `train-*.parquet` and `test-*.parquet` with columns `image` and `label`. The classifier sees the
60,000 training images; its accuracy on the 10,000 test images is written next to the weights and belongs to every figure
that it gives. The evaluation takes it as any other extractor of features:

    cd benchmarks
    accelerate launch ../training/evaluate.py --features fashion_mnist_judge:Judge \
        --feature_weights ../runs/judge/judge.safetensors …

Its distances are Fréchet distances on these features, not FIDs.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

FEATURES, CLASSES = 128, 10


class Classifier(nn.Module):
    """Three convolutions and two linear layers: images in [-1, 1] (B, 1, 28, 28) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int) -> list[nn.Module]:
            convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)]

        self.body = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128), nn.Flatten())
        self.penultimate = nn.Linear(128 * 3 * 3, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The input of the last layer, (B, 128)."""
        return F.relu(self.penultimate(self.body(images)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(images)))


class Judge(nn.Module):
    """The trained classifier as an extractor of `training/evaluate.py`.

    Args:
        weights: the file that this script has written.
    """

    def __init__(self, weights: str):
        super().__init__()
        self.network = Classifier()
        self.network.load_state_dict(load_file(weights))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images (B, 1, 28, 28) to features (B, 128) and logits (B, 10)."""
        features = self.network.features(images.float() / 127.5 - 1)
        return features, self.network.head(features)

    def features(self, images: torch.Tensor) -> np.ndarray:
        """Features of images in [-1, 1] (N, 1, 28, 28): (N, 128), float64."""
        return self._in_parts(images)[0].double().numpy()

    def predict(self, images: torch.Tensor) -> np.ndarray:
        """Classes of images in [-1, 1] (N, 1, 28, 28): (N,), int64."""
        return self._in_parts(images)[1].argmax(1).numpy()

    def _in_parts(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for part in images.float().split(1000):
            features = self.network.features(part)
            found.append((features, self.network.head(features)))
        return torch.cat([f for f, _ in found]), torch.cat([logits for _, logits in found])


def load_images(folder: str | Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a split in the order of its files.

    Returns:
        uint8 (N, 1, 28, 28), and labels (N,), int64.
    """
    files = sorted(Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet.")
    table = parquet.ParquetDataset(files).read(["image", "label"])
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).unsqueeze(1), torch.tensor(table["label"].to_pylist())


def accuracy(network: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of uint8 images that the network gives their class."""
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part.float() / 127.5 - 1).argmax(1) for part in images.split(1000)])
    return (found == labels).double().mean().item()


def train(
    images: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int, peak: float, seed: int
) -> Classifier:
    """Trains on uint8 images by AdamW under a one-cycle schedule."""
    torch.manual_seed(seed)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.01)
    updates = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * updates)
    for epoch in range(epochs):
        network.train()
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images))[: updates * batch_size]
        for indices in order.split(batch_size):
            loss = F.cross_entropy(network(images[indices].float() / 127.5 - 1), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / updates:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the parquet files")
    parser.add_argument("--output", default="runs/judge", help="folder of judge.safetensors and judge.json")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    images, labels = load_images(options.data, "train")
    start = time.process_time()
    network = train(images, labels, options.epochs, options.batch_size, options.learning_rate, options.seed)
    facts = {
        "test_accuracy": accuracy(network, *load_images(options.data, "test")),
        "training_images": len(images),
        "features": FEATURES,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "cpu_seconds": round(time.process_time() - start),
        "settings": {key: value for key, value in vars(options).items() if key not in ("data", "output")},
    }
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), output / "judge.safetensors")
    (output / "judge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
