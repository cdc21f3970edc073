"""`training/likelihood.py`: what it writes."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..data import load_images
from ..errors import InputError
from ..files import write_text
from ..loading import load_pipeline
from ..pipelines import InterpolantPipeline
from ..settings import settings_to_dict
from .config import LikelihoodConfig
from .likelihood import bits_per_dimension


def measure_likelihood(settings: LikelihoodConfig) -> dict[str, Any]:
    """Computes the likelihood and writes the result next to the teacher.

    Returns:
        The contents of the file.

    Raises:
        InputError: when the teacher or the data cannot be loaded, or do not fit each other.
    """
    output = Path(settings.output) if settings.output else Path(settings.teacher) / "likelihood.json"
    if not output.parent.is_dir():
        raise InputError(f"`output` {output} is in no folder that exists; set `output` to a file.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_pipeline(InterpolantPipeline, "teacher", settings.teacher, settings.trust_remote_code).to(device)
    data = load_images(settings.data)
    count = min(settings.num_samples or len(data), len(data))
    result = bits_per_dimension(
        teacher,
        torch.stack([data.read(i) for i in range(count)]),
        list(data.labels[:count]) if teacher.network.num_classes else None,
        seed=settings.seed,
        probes=settings.probes or None,
        batch_size=settings.batch_size,
        rtol=settings.rtol,
        atol=settings.atol,
    )
    contents = {
        "bits per dimension": result.mean,
        "standard error": result.standard_error,
        "network evaluations": result.evaluations,
        "images": count,
        "bound": "upper bound by uniform dequantisation of 256 levels; value k is (k + u - 1/2) / 127.5 - 1",
        "teacher": settings.teacher,
        "data": {"name": data.name, **settings_to_dict(settings.data)},
        "settings": {name: getattr(settings, name) for name in ("probes", "rtol", "atol", "seed", "batch_size")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "output": str(output),
    }
    write_text(output, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
    return contents
