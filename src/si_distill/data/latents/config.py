"""Settings of `training/precompute_latents.py`."""

from dataclasses import dataclass, field

from ...errors import InputError
from ...settings import MOST_PROCESSES, MOST_SAMPLES, at_least, setting
from ..config import DataConfig


@dataclass
class LatentsConfig:
    """Which images are encoded with which VAE, and where the latents go."""

    vae: str = setting("", "A pipeline with a VAE (the teacher), or a VAE: a folder or a Hub id.")
    output_dir: str = setting("", "Folder of the cache; a run that was cut off goes on there.")
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = setting(
        32, "Images encoded at once on each device; each goes through the VAE with its mirror image."
    )
    num_threads: int = setting(4, "Threads that decode images, per device.")
    images_per_shard: int = setting(4096, "Images in a file; what a kill can cost each process.")
    dtype: str = setting(
        "float16",
        "How moments are stored. float16 rounds them by at most 1 part in 2,048, a thousandth of the spread of latents.",
        ("float16", "float32"),
    )
    mixed_precision: str = setting("no", "`bf16` runs the VAE in bfloat16.", ("no", "bf16"))
    dry_run: bool = setting(False, "Print what would be made and its size; load and write nothing.")

    def __post_init__(self) -> None:
        if not self.vae or not self.output_dir:
            raise InputError("Give --vae (a teacher's folder, a VAE's folder or a Hub id) and --output_dir (a folder).")
        if self.data.has_references:
            raise InputError("Latents are made of images alone: leave the references of `data` out.")
        for name in ("batch_size", "images_per_shard"):
            at_least(name, getattr(self, name), 1, MOST_SAMPLES)
        at_least("num_threads", self.num_threads, 1, MOST_PROCESSES)
