#!/usr/bin/env python
"""Makes what `make demo-text` trains on: captioned images of digits, and a text-to-image pipeline that knows nothing yet.

    python benchmarks/text_digits_data.py --out runs/text-digits

writes `images.parquet` (columns image, text, digit, colour and place) and `pipeline/`, a Lumina2Pipeline of diffusers with
random weights. An image is 128 × 128 pixels, of which each 8 × 8 are one: its latents are 16 × 16.
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import AddedToken
from torch import nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

DIGITS = "zero one two three four five six seven eight nine".split()
COLOURS = {"red": (235, 50, 50), "green": (50, 205, 80), "blue": (70, 110, 255), "yellow": (240, 220, 60)}
#: What captions call a place, and the column and row of the digit's corner there.
PLACES = {"on the left": (0, 4), "on the right": (8, 4), "at the top": (4, 0), "at the bottom": (4, 8)}
#: Side of an image before it is enlarged, and how many pixels on a side one of them becomes.
SIDE, ENLARGED = 16, 8


@dataclass(frozen=True)
class Scene:
    """What an image shows: numbers of a digit, a colour and a place."""

    digit: int
    colour: int
    place: int

    @property
    def caption(self) -> str:
        """E.g. "a red seven on the left"."""
        return f"a {list(COLOURS)[self.colour]} {DIGITS[self.digit]} {list(PLACES)[self.place]}"


#: Everything that can be shown, in the order of digit, colour and place.
SCENES = [Scene(d, c, p) for d in range(len(DIGITS)) for c in range(len(COLOURS)) for p in range(len(PLACES))]


def draw(count: int, seed: int, part: slice = slice(None)) -> tuple[np.ndarray, list[Scene]]:
    """Scenes of random digits, colours and places: images (N, 16, 16, 3), uint8, and what they show.

    Args:
        count: how many.
        seed: of all choices.
        part: of scikit-learn's digits to take the handwriting from.
    """
    scenes = [SCENES[number] for number in np.random.default_rng(seed).integers(len(SCENES), size=count)]
    return paint(scenes, seed, part), scenes


def paint(scenes: list[Scene], seed: int, part: slice = slice(None)) -> np.ndarray:
    """(N, 16, 16, 3), uint8: these scenes in random handwriting, strength of the colour and grey of the background."""
    table, generator = load_digits(), np.random.default_rng(seed)
    shapes, digits = table.images[part] / 16, table.target[part]
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        x, y = list(PLACES.values())[scene.place]
        ink = np.zeros((SIDE, SIDE, 1))
        ink[y : y + 8, x : x + 8, 0] = shapes[generator.choice(np.flatnonzero(digits == scene.digit))]
        colour = np.array(list(COLOURS.values())[scene.colour]) * generator.uniform(0.85, 1.0)
        image[:] = np.round(ink * colour + (1 - ink) * generator.uniform(0, 50))
    return images


def enlarge(images: np.ndarray) -> np.ndarray:
    """(N, 16, 16, 3) to (N, 128, 128, 3): each pixel becomes a square."""
    return images.repeat(ENLARGED, 1).repeat(ENLARGED, 2)


def shrink(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 128, 128) to (N, 3, 16, 16): each square becomes the pixel that is its mean."""
    return nn.functional.avg_pool2d(images, ENLARGED)


def write_images(path: Path, count: int, seed: int) -> None:
    """The images as a Parquet file that `datasets` reads."""
    images, scenes = draw(count, seed)
    names = {"digit": DIGITS, "colour": list(COLOURS), "place": list(PLACES)}
    rows: dict[str, list[Any]] = {"image": [], "text": [scene.caption for scene in scenes]}
    rows |= {name: [getattr(scene, name) for scene in scenes] for name in names}
    for image in enlarge(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
    kinds = {name: datasets.ClassLabel(names=values) for name, values in names.items()}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), **kinds})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))


def build_pipeline(seed: int) -> Lumina2Pipeline:
    """A Lumina2Pipeline with random network and text encoder, whose autoencoder enlarges pixels."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=SIDE,
        patch_size=4,
        in_channels=3,
        hidden_size=96,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=4,
        multiple_of=16,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, SIDE, SIDE),
        cap_feat_dim=32,
    )
    start_small(transformer)
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=enlarging_autoencoder(),
        text_encoder=Gemma2Model(
            # Its last hidden states but one are the words themselves.
            Gemma2Config(
                num_hidden_layers=1,
                hidden_size=32,
                intermediate_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=512,
            )
        ),
        tokenizer=word_tokenizer(),
    )
    pipeline.tokenizer.add_tokens([AddedToken(f"{pipeline.system_prompt} <Prompt Start>", normalized=False)])
    return pipeline


def word_tokenizer() -> GemmaTokenizer:
    """The words of captions as tokens; other texts become characters or bytes."""
    codes = [f"<0x{code:02X}>" for code in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *codes, "\u2581", *letters]
    numbered = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = GemmaTokenizer(vocab=numbered, merges=[], model_max_length=256, add_bos_token=True)
    words = dict.fromkeys(word for scene in SCENES for word in scene.caption.split())
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in words])
    return tokenizer


@torch.no_grad()
def start_small(network: Lumina2Transformer2DModel) -> None:
    """Blocks that add nothing yet and an output that is nearly 0, as DiT starts; the first layer of the time tells times in
    [0, 1] apart.

    The network's own sines are made for times up to 1,000: over [0, 1] all of them are nearly straight lines.
    """
    for block in (*network.noise_refiner, *network.layers):
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(network.norm_out.linear_1.weight)
    nn.init.zeros_(network.norm_out.linear_1.bias)
    nn.init.normal_(network.norm_out.linear_2.weight, std=0.01)  # not 0, of which guidance would take the norm
    nn.init.zeros_(network.norm_out.linear_2.bias)
    first = network.time_caption_embed.timestep_embedder.linear_1
    slopes, kinks = 20 * torch.randn(len(first.bias)), torch.rand(len(first.bias))
    nn.init.zeros_(first.weight)
    first.weight[:, first.in_features // 2] = slopes  # of sin(t), the first sine after the cosines
    first.bias.copy_(-slopes * kinks.sin())


@torch.no_grad()
def enlarging_autoencoder() -> AutoencoderKL:
    """An autoencoder whose latents are the means of 8 × 8 pixels, and whose images are latents enlarged: nothing to train.

    Its layers copy the three colours and their negatives next to two large constants of opposite sign: after the
    normalisation of both halves the colours are multiplied by the same number for every image, and SiLU(x) − SiLU(−x) = x.
    """
    large, blocks = 256.0, 4
    vae = AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=0,
        latent_channels=3,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE * ENLARGED,
        # Of the images: latents have about mean 0 and standard deviation 1.
        shift_factor=-0.75,
        scaling_factor=1.25,
    )
    for name, parameter in vae.named_parameters():  # residual branches add nothing
        nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    signs = torch.cat([torch.eye(3), -torch.eye(3)])
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight[:6, :, 1, 1] = signs
        half.conv_in.bias[6:] = torch.tensor([large, -large])
        nn.init.constant_(half.conv_norm_out.weight, large / 2)  # the root mean square of the eight channels
        half.conv_out.weight[:3, :6, 1, 1] = signs.T
    vae.encoder.conv_out.bias[3:] = -30.0  # the logarithm of the latents' variance
    for module in vae.modules():
        kind = type(module).__name__
        if kind == "Downsample2D":  # its padding is at the right and at the bottom
            module.conv.weight[:, :, :2, :2] = torch.eye(8)[..., None, None] / 4
        elif kind == "Upsample2D":
            module.conv.weight[:, :, 1, 1] = torch.eye(8)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/text-digits"), help="folder of the data and the pipeline"
    )
    parser.add_argument("--images", type=int, default=6_000, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="of images and weights")
    arguments = parser.parse_args()
    write_images(arguments.out / "images.parquet", arguments.images, arguments.seed)
    pipeline = build_pipeline(arguments.seed)
    pipeline.save_pretrained(arguments.out / "pipeline")
    weights = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    print(f"{arguments.images:,} images and a Lumina2Pipeline of {weights:,} weights are in {arguments.out}.")


if __name__ == "__main__":
    main()
