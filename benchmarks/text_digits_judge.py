"""The judge of pictures of captioned digits: a small network that names digit, colour and place of real images."""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from text_digits_data import COLOURS, DIGITS, PLACES, Scene, draw
from torch import nn

#: What is told of an image, and how many answers there are.
QUESTIONS = {"digit": len(DIGITS), "colour": len(COLOURS), "place": len(PLACES)}
FEATURES = 64


class Judge(nn.Module):
    """Images (N, 3, 16, 16) in [-1, 1] to features (N, 64) and to logits of digit, colour and place."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *(*layer(3, 32), nn.MaxPool2d(2), *layer(32, 64), *layer(64, 64), nn.MaxPool2d(2), *layer(64, 64)),
            *(nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU()),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in QUESTIONS.items()})

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.body(images)
        return features, {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 64), of any number of images."""
        return torch.cat([self(part)[0] for part in images.split(500)])

    @torch.no_grad()
    def right(self, images: torch.Tensor, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        """Which images (N,) show the digit, the colour and the place that they should, and which of them all three."""
        answers = [self(part)[1] for part in images.split(500)]
        found = {
            name: torch.cat([part[name].argmax(1) for part in answers]) == wanted[name]
            for wanted in [answers_of(scenes)]
            for name in QUESTIONS
        }
        return {**found, "all": torch.stack(list(found.values())).all(0)}


def answers_of(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What there is to say of scenes: (N,) for each question."""
    return {name: torch.tensor([getattr(scene, name) for scene in scenes]) for name in QUESTIONS}


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, 16, 16, 3), uint8, to (N, 3, 16, 16) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(steps: int = 600, seed: int = 0, part: slice = slice(None)) -> Judge:
    """A judge of images with these digits' handwriting, from 20,000 images with some noise on them."""
    torch.manual_seed(seed)
    judge, (images, scenes) = Judge(), draw(20_000, seed + 1000, part)
    images, wanted = as_tensor(images), answers_of(scenes)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    judge.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (128,))
        _, logits = judge(images[rows] + 0.1 * torch.randn(len(rows), *images.shape[1:]))
        loss = sum(nn.functional.cross_entropy(logits[name], wanted[name][rows]) for name in QUESTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def load_judge(path: Path) -> Judge:
    """The judge in this file; trained and written first when there is none."""
    if not path.exists():
        start = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(train_judge().state_dict(), path)
        print(f"Trained the judge in {time.perf_counter() - start:.0f} s: {path}")
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)
