"""Trackers that follow a run, such as wandb or tensorboard, through Accelerate."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ...errors import InputError
from ...settings import settings_to_dict
from ..config import TrainingConfig
from ..parallel.accelerator import agree


def start_trackers(accelerator: Accelerator, settings: TrainingConfig, name: str) -> None:
    """Starts what `report_to` asks for; collective.

    Args:
        accelerator, settings: of the run.
        name: of the run.

    Raises:
        InputError: when a tracker does not start.
    """
    if settings.report_to == "none":
        return

    def start() -> None:
        accelerator.init_trackers(
            "si_distill",
            config=_flat(settings_to_dict(settings)),
            init_kwargs={"wandb": {"dir": settings.output_dir, "name": name}},
        )

    error = agree(accelerator, start, (Exception,))  # each of these libraries has errors of its own
    if error:
        raise InputError(f"The tracker {settings.report_to} could not be started: {error}. `report_to` can be none.")


def show_picture(accelerator: Accelerator, picture: Image.Image, step: int) -> None:
    """Gives the trackers that show pictures, as `samples`, the one of this iteration."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [picture]}, step=step)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as the flat scalars that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
