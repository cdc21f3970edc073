"""VAEs and latent caches, as small as they come."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from si_distill.data.latents.config import LatentsConfig
from si_distill.data.latents.encoding import precompute_latents
from si_distill.settings import parse_settings


def tiny_autoencoder(seed: int = 0, levels: int = 2, **config) -> AutoencoderKL:
    """A VAE of a few thousand parameters that halves images `levels` − 1 times, with latents of 4 channels."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    shape = dict(block_out_channels=(4,) * levels, norm_num_groups=4, latent_channels=4, scaling_factor=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**{**blocks, **shape, **config}).eval()


#: 50 digits in shards of 20, 20 and 10.
CACHE = "--data.name digits --data.max_train_samples 50 --images_per_shard 20 --batch_size 8 --dtype float32".split()


def precompute(vae: Path, folder: Path, *arguments) -> Path:
    """Makes a cache in this process."""
    argv = ["--vae", vae, "--output_dir", folder, *CACHE, *arguments]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the scripts in tests have it: with others, sums are rounded otherwise
    try:
        precompute_latents(parse_settings(LatentsConfig, list(map(str, argv))))
    finally:
        torch.set_num_threads(threads)
    return folder
