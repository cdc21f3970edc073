"""Figures of single images next to their prompts: CLIP score and PickScore of plain `transformers` models, saturation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from .. import fingerprints
from ..errors import InputError
from .formulas import saturation

#: The processor of PickScore, whose own repository has none.
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Scorer(Protocol):
    """Gives each image of a prompt a figure.

    Attributes:
        identity: plain values; two scorers with the same ones give the same figures.
    """

    identity: dict[str, Any]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Figures (B,), float64, of uint8 images (B, C, H, W) on the CPU and their B prompts."""
        ...


class Saturation:
    """The share of values of pixels that are 0 or 255: what guidance that is too strong makes grow."""

    identity: dict[str, Any] = {"figure": "share of values at 0 or 255"}

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        return saturation(images).numpy()


class ClipScorer:
    """
    scale · cos(image, prompt) of a CLIP model's embeddings, from its projections. Longer prompts are cut to its context.

    Args:
        setting: that named the model.
        name: a folder or Hub id of a `CLIPModel`.
        device: where it runs, in float32.
        scale: of the cosine; None is the model's own, exp(logit_scale).
        least: cosines below it count as it.
        processor: where the processor is, when the model's folder has none.

    Raises:
        InputError: when the model or its processor cannot be loaded, or weights are missing.
    """

    def __init__(
        self,
        setting: str,
        name: str,
        device: torch.device,
        scale: float | None = None,
        least: float = -1.0,
        processor: str | None = None,
    ):
        check_model(setting, name)
        with _explained(setting, name):
            model, loaded = CLIPModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
            self.processor = _processor(name, processor)
        if missing := sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}):
            raise InputError(
                f"`{setting}` {name!r} is no CLIPModel: it lacks {len(missing)} of its weights, {missing[0]} first. "
                f"{_advice(setting)}"
            )
        self.model, self.device, self.least = model.to(device).eval().requires_grad_(False), device, least
        self.scale = float(model.logit_scale.exp()) if scale is None else scale
        self.identity = {
            "model": name,
            "weights": fingerprints.of_module(model),
            "scale": self.scale,
            "version": f"transformers {transformers.__version__}",
        }

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        inputs = self.processor(
            text=list(prompts),
            images=list(images.expand(-1, 3, -1, -1)),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(self.device)
        found = self.model(**inputs)  # both embeddings are of length 1
        cosines = (found.image_embeds.double() * found.text_embeds.double()).sum(-1)
        return (self.scale * cosines.clamp(min=self.least)).cpu().numpy()


def check_model(setting: str, name: str) -> None:
    """Refuses what is no CLIP model; of a repository, its config is read and no more.

    Args:
        setting: that named the model.
        name: a folder or Hub id.

    Raises:
        InputError: when there is none, or one of another type, or a folder without weights.
    """
    with _explained(setting, name):
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":  # would be loaded as a CLIP of random weights
            raise ValueError(f"it is of the type {kind}, not clip")
        if Path(name).is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in Path(name).iterdir()):
            raise ValueError("the folder holds no weights")


@contextmanager
def _explained(setting: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"`{setting}` {name!r} cannot be loaded: {first.rstrip('.')}. {_advice(setting)}") from error


def _advice(setting: str) -> str:
    return (
        f"Give `{setting}` a folder or Hub id of a CLIPModel with its processor, or choose another metric; without network "
        "access it must be on this machine."
    )


def _processor(name: str, other: str | None) -> CLIPProcessor:
    try:
        return CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError, TypeError):
        if other is None:
            raise
        return CLIPProcessor.from_pretrained(other)


def clip_score(name: str, device: torch.device) -> ClipScorer:
    """100 · max(cos, 0), as most report it.

    Hessel et al. 2021 (CLIPScore, arXiv 2104.08718) define w · max(cos, 0) with w = 2.5 and "A photo depicts" before each
    caption; here w is 100 and the prompt stands alone. The mean over images is the figure.
    """
    return ClipScorer("clip_model", name, device, scale=100.0, least=0.0)


def pick_score(name: str, device: torch.device) -> ClipScorer:
    """exp(logit_scale) · cos with the fine-tuned CLIP-H of Kirstain et al. 2023 (Pick-a-Pic, arXiv 2305.01569): ≈ 20."""
    return ClipScorer("pick_model", name, device, processor=PICK_PROCESSOR)
