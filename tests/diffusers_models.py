"""Teachers of diffusers' own classes, as small as they come."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)


def tiny_dit(**config) -> DiTTransformer2DModel:
    shape = dict(num_attention_heads=2, attention_head_dim=4, num_layers=3, sample_size=8, patch_size=4, in_channels=2)
    torch.manual_seed(0)
    network = DiTTransformer2DModel(**{**shape, "num_embeds_ada_norm": 3, "norm_num_groups": 2, **config})
    return network.eval()


def tiny_unet(**config) -> UNet2DModel:
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(4, 8))
    shape = dict(sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, norm_num_groups=2)
    torch.manual_seed(0)
    return UNet2DModel(**{**blocks, **shape, "attention_head_dim": 4, **config}).eval()


def save_dit_pipeline(folder, scheduler=None):
    """Latents of 4 channels, learned variance, 1,000 classes (DiTPipeline's null class is 1,000) and their names."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3)
    network = tiny_dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    pipeline = DiTPipeline(network, vae.eval(), scheduler or DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    # DiTPipeline forgets the names when it saves; published folders have them.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"1": "goldfish, Carassius auratus", "207": "golden retriever"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline


def save_ddpm_pipeline(folder, scheduler=None, **config):
    pipeline = DDPMPipeline(tiny_unet(**config), scheduler or DDPMScheduler())
    pipeline.save_pretrained(folder)
    return pipeline


def save_folders(folder, network, scheduler=None):
    """A network's folder with its scheduler's beside it; returns the former."""
    network.save_pretrained(folder / "network")
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    return folder / "network"
