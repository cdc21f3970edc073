"""The three UNets of EDM (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix
F.2) as a Diffusers model: DDPM++ and NCSN++ (Song et al. 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations", appendix H) and ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis").

It is the bare network F(c_in x, c_noise) inside EDM's preconditioning, which is the scheduler's part
(`prediction_type="edm"`, `timestep_type="log_sigma"`). Tensors are named as in the published checkpoints, so that these
convert without renaming.

This file travels into the transformer folder of every saved pipeline: it imports only torch and diffusers, and no
sibling, which diffusers would not fetch from the Hub.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput


@dataclass(frozen=True)
class Architecture:
    """What tells the three networks apart (Karras et al. 2022, table 7); the defaults are those of Song et al."""

    channel_mult_noise: int = 1  # width of the time features over the model's channels
    fourier: bool = False  # random Fourier features of the time, or sinusoids
    residual_encoder: bool = False  # a pyramid of the image runs along the encoder
    resample_filter: tuple[int, ...] = (1, 1)  # taps of the separable low-pass filter at a change of resolution
    adaptive: bool = False  # the embedding scales and shifts a normalised map, or is added before the normalisation
    project_resampled: bool = True  # a skip connection that changes the resolution has a 1 × 1 convolution too
    skip_scale: float = math.sqrt(0.5)  # after each sum with a skip connection
    num_heads: int | None = 1  # of the self-attention; None: heads of `attention_head_dim` channels
    eps: float = 1e-6  # of the group normalisations


ARCHITECTURES = {
    "ddpmpp": Architecture(),
    "ncsnpp": Architecture(2, fourier=True, residual_encoder=True, resample_filter=(1, 3, 3, 1)),
    "adm": Architecture(adaptive=True, project_resampled=False, skip_scale=1.0, num_heads=None, eps=1e-5),
}


@dataclass
class EDMUNet2DOutput(UNet2DOutput):
    """
    Output of `EDMUNet2DModel`.

    Args:
        sample (`torch.Tensor` of shape (B, C, H, W)): the prediction.
        features (`torch.Tensor` of shape (B, N, D), *optional*): the bottleneck's pixels, the encoder's last map.
    """

    features: torch.Tensor | None = None


class FourierFeatures(nn.Module):
    """sin and cos of 2π f c for fixed random frequencies f ~ N(0, 16²) (NCSN++)."""

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def _apply(self, fn, recurse=True):
        # Of a half-precision network too: phases of many turns, rounded to 8 bits, would be others.
        freqs = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < freqs.dtype.itemsize:
            self.freqs = freqs.to(self.freqs.device)
        return self

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        wide = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        phase = wide.outer(2 * math.pi * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class ResamplingConv2d(nn.Module):
    """
    A convolution at the new resolution, after a change of the resolution by two with a separable low-pass filter.

    Args:
        in_channels, out_channels (`int`): channels before and after.
        kernel_size (`int`): of the convolution, odd; 0 only changes the resolution.
        direction (`str`): `"down"` or `"up"`.
        resample_filter (`tuple[int]`): an even number of taps; they are scaled to sum to 1 (down) or 2 (up) in each axis.
        at_high_resolution (`bool`): the convolution comes before the reduction, as in NCSN++'s residual encoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        direction: str,
        resample_filter: tuple[int, ...],
        at_high_resolution: bool = False,
    ):
        super().__init__()
        self.direction, self.at_high_resolution = direction, at_high_resolution
        self.weight = self.bias = None
        if kernel_size:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
            self.bias = nn.Parameter(torch.zeros(out_channels))
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = (self.resample_filter.shape[-1] - 1) // 2
        if self.at_high_resolution:
            x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2 + padding)
            return self._resample(x, 0)
        x = self._resample(x, padding)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)

    def _resample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)


class EDMUNetBlock(nn.Module):
    """
    Residual block conditioned on the embedding, then self-attention.

    Args:
        in_channels, out_channels (`int`): channels before and after.
        emb_channels (`int`): width of the embedding.
        architecture (`Architecture`): the kind of network.
        num_heads (`int`): heads of the self-attention; 0 is none.
        direction (`str`, *optional*): `"down"` or `"up"` halves or doubles the resolution.
        dropout (`float`): before the second convolution, in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        architecture: Architecture,
        num_heads: int = 0,
        direction: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_heads, self.adaptive, self.skip_scale = num_heads, architecture.adaptive, architecture.skip_scale
        eps, taps = architecture.eps, architecture.resample_filter
        self.norm0 = _group_norm(in_channels, eps)
        self.conv0 = _conv(in_channels, out_channels, 3, direction, taps)
        self.affine = nn.Linear(emb_channels, (2 if self.adaptive else 1) * out_channels)
        self.norm1 = _group_norm(out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = _conv(out_channels, out_channels, 3)
        projected = in_channels != out_channels or (direction and architecture.project_resampled)
        self.skip = None
        if projected or direction:
            self.skip = _conv(in_channels, out_channels, 1 if projected else 0, direction, taps)
        if num_heads:
            self.norm2 = _group_norm(out_channels, eps)
            self.qkv = _conv(out_channels, 3 * out_channels, 1)
            self.proj = _conv(out_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), emb (B, E) after its activation."""
        residual = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = condition.chunk(2, dim=1)
            residual = self.norm1(residual) * (1 + scale) + shift
        else:
            residual = self.norm1(residual + condition)
        residual = self.conv1(self.dropout(F.silu(residual)))
        x = (residual + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (x + self.proj(self._attention(self.norm2(x)))) * self.skip_scale
        return x

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        # The published projections hold q, k and v of a channel side by side.
        qkv = self.qkv(x).unflatten(1, (self.num_heads, -1, 3)).flatten(4)
        query, key, value = qkv.transpose(2, 4).contiguous().unbind(3)  # the layout that fused attention takes
        return F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(x.shape)


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels, eps=eps)


def _conv(in_channels: int, out_channels: int, kernel_size: int, direction: str | None = None, taps=()) -> nn.Module:
    if direction:
        return ResamplingConv2d(in_channels, out_channels, kernel_size, direction, taps)
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class EDMUNet2DModel(ModelMixin, ConfigMixin):
    """
    DDPM++, NCSN++ or ADM as EDM trains them (Karras et al. 2022, table 7).

    Args:
        architecture (`str`): `"ddpmpp"`, `"ncsnpp"` or `"adm"`.
        sample_size (`int`): height and width of the image, divisible by two to the number of levels less one.
        in_channels (`int`): channels C of the image.
        num_classes (`int`): labels are 0 … num_classes − 1; 0 is an unconditional network.
        class_dropout_prob (`float`): share of labels that the teacher's training replaces by the null class; above 0 the
            label `num_classes` means "no class". The trainer draws the dropout.
        augment_dim (`int`): length of the augmentation labels; 0 is none, EDM's own augmentation has 9.
        model_channels (`int`), channel_mult (`list[int]`): their products are the widths of the levels.
        channel_mult_emb (`int`): width of the embedding over `model_channels`.
        num_blocks (`int`): blocks on each level of the encoder; the decoder has one more.
        attn_resolutions (`list[int]`): sizes of the maps with self-attention.
        attention_head_dim (`int`): channels of an attention head of `"adm"`; the others have one head.
        dropout (`float`): in training.

    Raises:
        ValueError: for an unknown architecture, or sizes and widths that do not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDMUNetBlock"]
    _repeated_blocks = ["EDMUNetBlock"]
    _skip_layerwise_casting_patterns = ["norm", "map_"]
    _keep_in_fp32_modules = ["map_noise"]

    @register_to_config
    def __init__(
        self,
        architecture: str = "ddpmpp",
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 0,
        class_dropout_prob: float = 0.0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: list[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: list[int] = (16,),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"`architecture` is {architecture!r}; choose one of: {', '.join(ARCHITECTURES)}.")
        sizes = (
            sample_size,
            in_channels,
            model_channels,
            *channel_mult,
            channel_mult_emb,
            num_blocks,
            attention_head_dim,
        )
        optional = (num_classes, augment_dim)
        if (
            not 1 <= len(channel_mult) <= 16
            or min(sizes) < 1
            or max(sizes) > 65536
            or num_blocks > 1000
            or min(optional) < 0
        ):
            raise ValueError(
                f"The network's sizes {sizes} and optional inputs {optional} are out of range: "
                "sizes are 1 to 65,536, blocks at most 1,000, `channel_mult` has 1 to 16 levels, optional inputs from 0."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must lie in [0, 1], got {class_dropout_prob}.")
        if sample_size % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"`sample_size` {sample_size} cannot be halved {len(channel_mult) - 1} times, as `channel_mult` asks for."
            )
        self.architecture = ARCHITECTURES[architecture]
        adm = self.architecture.adaptive
        noise_channels, emb_channels = (
            model_channels * self.architecture.channel_mult_noise,
            model_channels * channel_mult_emb,
        )
        if self.architecture.fourier:
            self.map_noise = FourierFeatures(noise_channels)
        else:
            self.map_noise = Timesteps(noise_channels, flip_sin_to_cos=adm, downscale_freq_shift=0 if adm else 1)
        # Song et al. add the class to the time features, ADM to the embedding.
        self.map_label = (
            nn.Linear(num_classes, emb_channels if adm else noise_channels, bias=not adm) if num_classes else None
        )
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self._build_levels([model_channels * factor for factor in channel_mult])
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _build_levels(self, widths: list[int]) -> None:
        config, architecture = self.config, self.architecture

        def block(in_channels: int, out_channels: int, attention: bool = False, direction: str | None = None):
            num_heads = architecture.num_heads or out_channels // config.attention_head_dim
            emb_channels = config.model_channels * config.channel_mult_emb
            return EDMUNetBlock(
                in_channels, out_channels, emb_channels, architecture, num_heads * attention, direction, config.dropout
            )

        levels = [(config.sample_size >> level, width) for level, width in enumerate(widths)]
        channels = widths[0] if architecture.adaptive else config.model_channels
        self.enc = nn.ModuleDict({f"{levels[0][0]}x{levels[0][0]}_conv": _conv(config.in_channels, channels, 3)})
        skips, image_channels = [channels], config.in_channels
        for size, width in levels:
            name = f"{size}x{size}"
            if size != config.sample_size:
                self.enc[f"{name}_down"] = block(channels, channels, direction="down")
                skips.append(channels)
                if architecture.residual_encoder:
                    self.enc[f"{name}_aux_residual"] = ResamplingConv2d(
                        image_channels, channels, 3, "down", architecture.resample_filter, at_high_resolution=True
                    )
                    image_channels = channels
            for index in range(config.num_blocks):
                self.enc[f"{name}_block{index}"] = block(channels, width, size in config.attn_resolutions)
                channels = width
                skips.append(channels)
        self.dec = nn.ModuleDict()
        for size, width in reversed(levels):
            name = f"{size}x{size}"
            if size == levels[-1][0]:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, direction="up")
            for index in range(config.num_blocks + 1):
                # Song et al. have attention after the last block of a level alone.
                attention = size in config.attn_resolutions and (architecture.adaptive or index == config.num_blocks)
                self.dec[f"{name}_block{index}"] = block(channels + skips.pop(), width, attention)
                channels = width
        self.out_norm = _group_norm(channels, architecture.eps)
        self.out_conv = _conv(channels, config.in_channels, 3)

    def _initialize_weights(self) -> None:
        """Song et al.: Xavier, with small last layers of residual branches, attention and output. ADM: PyTorch's own, zeros
        in those layers, and class embeddings N(0, 1)."""
        adm = self.architecture.adaptive
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d, ResamplingConv2d)) or module.weight is None:
                continue
            layer = name.rpartition(".")[2]
            last = layer in ("conv1", "proj", "out_conv")
            if not adm:
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if last else math.sqrt(0.2) if layer == "qkv" else 1.0)
            elif last or layer == "map_augment":
                nn.init.zeros_(module.weight)
            elif layer == "map_label":
                nn.init.normal_(module.weight)
            elif isinstance(module, ResamplingConv2d):  # as PyTorch's own convolutions, by which nothing else fills it
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.uniform_(module.bias, -bound, bound)
            if module.bias is not None and (last or not adm):
                nn.init.zeros_(module.bias)

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", or None for a network without classes or trained without label dropout."""
        return self.config.num_classes if self.config.num_classes and self.config.class_dropout_prob > 0 else None

    @property
    def feature_width(self) -> int:
        """D, the width of the features."""
        return self.config.model_channels * self.config.channel_mult[-1]

    @property
    def feature_size(self) -> int:
        """Height and width of the map that the features are."""
        return self.config.sample_size >> (len(self.config.channel_mult) - 1)

    def _embed(
        self, timestep: torch.Tensor, one_hot: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The embedding (B, E) that conditions all blocks."""
        adm = self.architecture.adaptive
        emb = self.map_noise(timestep).to(self.map_layer0.weight.dtype)
        if one_hot is not None and not adm:
            emb = emb + self.map_label(one_hot * math.sqrt(self.config.num_classes))
        if augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if one_hot is not None and adm:
            emb = emb + self.map_label(one_hot)
        return F.silu(emb)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        return_features: bool = False,
        augment_labels: torch.Tensor | None = None,
    ) -> EDMUNet2DOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): c_in x_t with H = W = `sample_size`.
            timestep (`torch.Tensor` of shape (B,) or a number): c_noise = ¼ ln σ. Keep it in float32.
            class_labels (`torch.LongTensor` of shape (B,), *optional*): classes; `null_class` means none. Unconditional
                networks ignore them.
            return_dict (`bool`): whether to return an output object or a tuple.
            return_features (`bool`): whether to return the bottleneck's pixels too, (B, N, D).
            augment_labels (`torch.Tensor` of shape (B, augment_dim), *optional*): what was done to the images. None, like
                zeros, means nothing: a network trained with augmentation then predicts images as they are.

        Returns:
            `EDMUNet2DOutput` whose `sample` has the shape of `hidden_states`, or a tuple of its fields.

        Raises:
            ValueError: for an image of another shape, missing classes, or augmentation labels that do not fit.
        """
        config, batch_size = self.config, len(hidden_states)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        if hidden_states.shape[1:] != shape:
            raise ValueError(f"This network takes images of shape (batch, *{shape}), got {tuple(hidden_states.shape)}.")
        if config.num_classes and class_labels is None:
            raise ValueError(f"This network has {config.num_classes} classes: pass `class_labels`, one for each image.")
        if augment_labels is not None and augment_labels.shape != (batch_size, config.augment_dim):
            raise ValueError(
                f"`augment_labels` has shape {tuple(augment_labels.shape)}, but this network (augment_dim "
                f"{config.augment_dim}) takes ({batch_size}, {config.augment_dim})."
            )
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch_size)
        one_hot = None
        if config.num_classes:  # the null class is all zeros
            one_hot = F.one_hot(class_labels, config.num_classes + 1)[:, : config.num_classes].to(hidden_states.dtype)
        if config.augment_dim:
            # Zeros go through the layer too: a parameter without a gradient stops distributed training.
            zeros = hidden_states.new_zeros(batch_size, config.augment_dim)
            augment_labels = zeros if augment_labels is None else augment_labels.to(hidden_states.dtype)
        emb = self._embed(timestep, one_hot, augment_labels)

        def run(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(block, *inputs)
            return block(*inputs)

        x, image, skips = hidden_states, hidden_states, []
        for name, block in self.enc.items():
            if name.endswith("aux_residual"):
                # NCSN++ (Song et al. 2021, appendix H): a pyramid of the image runs along and is added at each level.
                skips[-1] = x = image = (x + block(image)) * math.sqrt(0.5)
                continue
            x = run(block, x, emb) if isinstance(block, EDMUNetBlock) else block(x)
            skips.append(x)
        features = x.flatten(2).mT if return_features else None
        for name, block in self.dec.items():
            x = run(block, torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        sample = self.out_conv(F.silu(self.out_norm(x)))
        if return_dict:
            return EDMUNet2DOutput(sample=sample, features=features)
        return (sample, features) if return_features else (sample,)
