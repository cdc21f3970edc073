"""How fast a cache of latents is read, and what share of an iteration of SiT-XL/2 that is.

    python benchmarks/latent_rate.py

A cache of random moments is written and read as a training reads it: in the shuffled order of its epochs, on one thread of
the training's own process (`dataloader_num_workers` 0), so that nothing of it is hidden behind the networks.
"""

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_tools import hardware, hardware_line, markdown_table, write_json, write_text

from si_distill.data import DataConfig
from si_distill.data.batches import on_device
from si_distill.data.latents.dataset import LatentDataset, sampled
from si_distill.data.latents.format import Manifest, Recipe, write_shard
from si_distill.pipelines import LatentScaling
from si_distill.sample_noise import SampleNoise
from si_distill.settings import at_least, parse_settings, script_main, setting


@dataclass
class RateConfig:
    output: str = setting("benchmarks/results", "Folder of the results.")
    sizes: list[int] = setting([256, 512], "Sizes of the images in pixels; latents are an eighth.")
    images: int = setting(16384, "Images in each cache.")
    batch: int = setting(32, "Images in a batch.")
    batches: int = setting(256, "Batches that are read.")
    iteration_rate: float = setting(
        90.0,
        "Images per second and device of the training. 90: 5 critic updates and 1 generator update of SiT-XL/2 at 256 are "
        "21 forwards of 0.237 TFLOP for each image; 45 % of the 989 TFLOP/s of an H100 in bfloat16. At 512 a quarter of it.",
    )

    def __post_init__(self) -> None:
        for name in ("images", "batch", "batches"):
            at_least(name, getattr(self, name), 1)


def write_cache(folder: Path, size: int, images: int) -> None:
    """A cache of random moments in shards of up to 4,096 images."""
    shape, shards = [4, size // 8, size // 8], []
    data = DataConfig(name="random", image_size=size)
    settings = {name: getattr(data, name) for name in ("name", "image_size", "split")}
    vae = {"name": "none", "revision": None, "class": "none", "encoder": "none"}
    recipe = Recipe(vae, asdict(LatentScaling(0.18215)), settings, {}, "none", shape, "float16", "no", 4096)
    for first in range(0, images, 4096):
        count = min(4096, images - first)
        moments = torch.randn(count, 2, 2, *shape).half()
        path = folder / f"shard_{first // 4096:05d}-00000.safetensors"
        shards.append(write_shard(path, recipe, moments, torch.zeros(count, dtype=torch.int64), 0))
    Manifest(recipe, ["0"], shards).write(folder)


def measure(size: int, config: RateConfig) -> dict[str, float]:
    """Microseconds of processor time for each image: read from the cache; and drawn, scaled latents made of it."""
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), size, config.images)
        data = LatentDataset(DataConfig(name=folder, image_size=size))
        batches, noise = data.batches(config.batch), SampleNoise(0)
        next(batches)  # maps the first files
        spent = {"read": 0.0, "sample": 0.0}
        for step in range(config.batches):
            started = time.process_time()
            batch = on_device(next(batches), torch.device("cpu"))
            middle = time.process_time()
            shape, indices = batch["latents_mean"].shape[2:], range(config.batch)
            flip = noise.uniform("flip", step, indices=indices) < 0.5
            sampled(batch, flip, noise.normal(shape, "latents", step, indices=indices), data.scaling)
            spent["read"] += middle - started
            spent["sample"] += time.process_time() - middle
    return {name: 1e6 * seconds / (config.batch * config.batches) for name, seconds in spent.items()}


def main(argv: list[str]) -> None:
    config = parse_settings(RateConfig, argv, __doc__)
    torch.set_num_threads(1)
    rows = []
    for size in config.sizes:
        spent = measure(size, config)
        iteration = 1e6 / (config.iteration_rate * (256 / size) ** 2)
        rows.append({"size": size, **spent, "share": sum(spent.values()) / iteration, "iteration": iteration})
    facts = hardware(1)
    write_json(Path(config.output) / "latent_rate.json", {"settings": asdict(config), "hardware": facts, "rows": rows})
    columns = [
        "images",
        "read, µs per image",
        "flip, noise, scale, µs",
        "images per second",
        "share of an XL iteration",
    ]
    cells = [
        [
            f"{r['size']}²",
            f"{r['read']:.0f}",
            f"{r['sample']:.0f}",
            f"{1e6 / (r['read'] + r['sample']):,.0f}",
            f"{r['share']:.1%}",
        ]
        for r in rows
    ]
    text = (
        markdown_table(columns, cells)
        + f"\n\nProcessor time of one thread in the training's own process, {config.batches} batches of {config.batch} from "
        f"{config.images:,} images in the system's page cache. The share is of an assumed {config.iteration_rate:g} images "
        f"per second and device at 256² and a quarter at 512² (see --help). {hardware_line(facts)}"
    )
    write_text(Path(config.output) / "latent_rate.md", text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    script_main(main)
