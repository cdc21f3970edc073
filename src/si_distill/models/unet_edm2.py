"""The magnitude-preserving UNet of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", configuration G) as a Diffusers model.

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
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

#: `model_channels` of the published sizes (Karras et al. 2024, table 6).
EDM2_PRESETS = {
    "EDM2-XS": 128,
    "EDM2-S": 192,
    "EDM2-M": 256,
    "EDM2-L": 320,
    "EDM2-XL": 384,
    "EDM2-XXL": 448,
}
#: Shares of the second operand in the sums: residual branch, attention branch, class against time.
RESIDUAL_BALANCE, ATTENTION_BALANCE, LABEL_BALANCE = 0.3, 0.3, 0.5
#: Activations are clipped here after each block, for half precision.
CLIP_ACTIVATIONS = 256.0


@dataclass
class EDM2UNet2DOutput(UNet2DOutput):
    """
    Output of `EDM2UNet2DModel`.

    Args:
        sample (`torch.Tensor` of shape (B, C, H, W)): the prediction.
        features (`torch.Tensor` of shape (B, N, D), *optional*): the bottleneck's pixels, the encoder's last map.
    """

    features: torch.Tensor | None = None


def normalize(x: torch.Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> torch.Tensor:
    """x divided by ε + its root mean square over the dimensions `dim`, which is computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (eps + wide.square().mean(dim, keepdim=True).sqrt())).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU over 0.596, the root mean square that it gives to standard normal inputs (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, balance: float) -> torch.Tensor:
    """((1 − s) a + s b) / √((1 − s)² + s²): unit variance of independent operands is kept (eq. 88)."""
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a and b along the channels, (B, N_a, …) and (B, N_b, …), each scaled so that it gives half of the sum of squares
    and the whole keeps unit variance: √((N_a + N_b) / (2 N)) for N channels (eq. 103)."""
    half = (a.shape[1] + b.shape[1]) / 2
    return torch.cat([math.sqrt(half / a.shape[1]) * a, math.sqrt(half / b.shape[1]) * b], dim=1)


class MPFourier(nn.Module):
    """√2 cos(2π (f c + φ)) for fixed random frequencies f ~ N(0, 1) and phases φ ~ U(0, 1) (eq. 75); both hold the 2π."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def _apply(self, fn, recurse=True):
        # Of a half-precision network too: phases of several turns, rounded to 8 bits, would be others.
        freqs, phases = self.freqs, self.phases
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize < freqs.dtype.itemsize:
            self.freqs, self.phases = freqs.to(self.freqs.device), phases.to(self.freqs.device)
        return self

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(timestep.dtype, torch.float32)
        return math.sqrt(2) * torch.cos(timestep.to(wide).outer(self.freqs.to(wide)) + self.phases.to(wide))


class MPConv(nn.Module):
    """
    A convolution or linear layer without bias whose weight vectors have unit variance whatever the optimizer does (eq. 47),
    so that it keeps the variance of its input.

    In training mode the stored weights are normalised too, in each forward: otherwise they would grow without effect on
    the output and the effective learning rate would decay ("forced weight normalisation", eq. 66). The attribute `forced`
    switches that off, as SiDA's training of EDM2-S does.

    Args:
        in_channels, out_channels (`int`): channels before and after.
        kernel_size (`int`): odd; 0 is a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 0):
        super().__init__()
        self.forced = True
        kernel = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        dim = tuple(range(1, self.weight.ndim))
        if self.training and self.forced:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dim))
        weight = normalize(self.weight, dim) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class EDM2UNetBlock(nn.Module):
    """
    Residual block scaled by the embedding, then self-attention (figure 21).

    Args:
        in_channels, out_channels (`int`): channels before and after.
        emb_channels (`int`): width of the embedding.
        decoder (`bool`): encoder blocks project and normalise their input first; decoder blocks project the skip
            connection alone.
        num_heads (`int`): heads of the self-attention; 0 is none.
        direction (`str`, *optional*): `"down"` averages 2 × 2 pixels, `"up"` repeats them.
        dropout (`float`): before the second convolution, in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        decoder: bool,
        num_heads: int = 0,
        direction: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.decoder, self.num_heads, self.direction = decoder, num_heads, direction
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if num_heads else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), emb (B, E) after its activation."""
        if self.direction == "down":
            x = F.avg_pool2d(x, 2)
        elif self.direction == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        residual = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        residual = self.conv_res1(self.dropout(mp_silu(residual * scale[:, :, None, None])))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, residual, RESIDUAL_BALANCE)
        if self.num_heads:
            x = mp_sum(x, self.attn_proj(self._attention(x)), ATTENTION_BALANCE)
        return x.clamp(-CLIP_ACTIVATIONS, CLIP_ACTIVATIONS)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        # Cosine attention. The published projections hold q, k and v of a channel side by side.
        qkv = self.attn_qkv(x).unflatten(1, (self.num_heads, -1, 3)).flatten(4)
        query, key, value = normalize(qkv, dim=2).transpose(2, 4).contiguous().unbind(3)  # what fused attention takes
        return F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(x.shape)


class EDM2UNet2DModel(ModelMixin, ConfigMixin):
    """
    EDM2's magnitude-preserving UNet.

    Args:
        sample_size (`int`): height and width of the (latent) image, divisible by two to the number of levels less one.
        in_channels (`int`): channels C of the (latent) image.
        num_classes (`int`): labels are 0 … num_classes − 1; 0 is an unconditional network.
        class_dropout_prob (`float`): share of labels that the teacher's training replaces by the null class; above 0 the
            label `num_classes` means "no class". The trainer draws the dropout. The published networks have none.
        model_channels (`int`), channel_mult (`list[int]`): their products are the widths of the levels.
        num_blocks (`int`): blocks on each level of the encoder; the decoder has one more.
        attn_resolutions (`list[int]`): sizes of the maps with self-attention.
        attention_head_dim (`int`): channels of an attention head.
        dropout (`float`): in training.

    Raises:
        ValueError: for sizes that do not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDM2UNetBlock"]
    _repeated_blocks = ["EDM2UNetBlock"]
    _skip_layerwise_casting_patterns = ["emb_"]
    _keep_in_fp32_modules = ["emb_fourier"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.0,
        model_channels: int = 192,
        channel_mult: list[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: list[int] = (16, 8),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        sizes = (sample_size, in_channels, model_channels, *channel_mult, num_blocks, attention_head_dim)
        optional = (num_classes,)
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
        widths = [model_channels * factor for factor in channel_mult]
        emb_channels = max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_channels)
        self.emb_label = MPConv(num_classes, emb_channels) if num_classes else None

        def block(in_channels: int, out_channels: int, attention: bool = False, direction: str | None = None):
            num_heads = out_channels // attention_head_dim if attention else 0
            decoder = hasattr(self, "dec")
            return EDM2UNetBlock(in_channels, out_channels, emb_channels, decoder, num_heads, direction, dropout)

        levels = [(sample_size >> level, width) for level, width in enumerate(widths)]
        # A channel of ones stands in for the biases that the layers do not have.
        self.enc = nn.ModuleDict({f"{sample_size}x{sample_size}_conv": MPConv(in_channels + 1, widths[0], 3)})
        channels, skips = widths[0], [widths[0]]
        for size, width in levels:
            if size != sample_size:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, direction="down")
                skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{size}x{size}_block{index}"] = block(channels, width, size in attn_resolutions)
                channels = width
                skips.append(channels)
        self.dec = nn.ModuleDict()
        for size, width in reversed(levels):
            if size == levels[-1][0]:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, direction="up")
            for index in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{index}"] = block(channels + skips.pop(), width, size in attn_resolutions)
                channels = width
        self.out_conv = MPConv(channels, in_channels, 3)
        self.gradient_checkpointing = False

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "EDM2UNet2DModel":
        """
        A randomly initialised network of a published size, e.g. `from_preset("EDM2-XS", sample_size=64, in_channels=4)`.

        Args:
            preset (`str`): EDM2-XS, S, M, L, XL or XXL.
            overrides: other constructor arguments.
        """
        if preset not in EDM2_PRESETS:
            raise ValueError(f"Unknown preset {preset!r}. Choose one of: {', '.join(EDM2_PRESETS)}.")
        return cls(**{"model_channels": EDM2_PRESETS[preset], **overrides})

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

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        return_features: bool = False,
    ) -> EDM2UNet2DOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): c_in x_t with H = W = `sample_size`.
            timestep (`torch.Tensor` of shape (B,) or a number): c_noise = ¼ ln σ. Keep it in float32.
            class_labels (`torch.LongTensor` of shape (B,), *optional*): classes; `null_class` means none. Unconditional
                networks ignore them.
            return_dict (`bool`): whether to return an output object or a tuple.
            return_features (`bool`): whether to return the bottleneck's pixels too, (B, N, D).

        Returns:
            `EDM2UNet2DOutput` whose `sample` has the shape of `hidden_states`, or a tuple of its fields.

        Raises:
            ValueError: for an image of another shape, or missing classes.
        """
        config, batch_size = self.config, len(hidden_states)
        shape = (config.in_channels, config.sample_size, config.sample_size)
        if hidden_states.shape[1:] != shape:
            raise ValueError(f"This network takes images of shape (batch, *{shape}), got {tuple(hidden_states.shape)}.")
        if config.num_classes and class_labels is None:
            raise ValueError(f"This network has {config.num_classes} classes: pass `class_labels`, one for each image.")
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch_size)
        emb = self.emb_noise(self.emb_fourier(timestep).to(hidden_states.dtype))
        if config.num_classes:  # the null class has no component: all zeros
            one_hot = F.one_hot(class_labels, config.num_classes + 1)[:, : config.num_classes].to(hidden_states.dtype)
            emb = mp_sum(emb, self.emb_label(one_hot * math.sqrt(config.num_classes)), LABEL_BALANCE)
        emb = mp_silu(emb)

        def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if not isinstance(block, EDM2UNetBlock):
                return block(x)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(block, x, emb)
            return block(x, emb)

        x, skips = torch.cat([hidden_states, torch.ones_like(hidden_states[:, :1])], dim=1), []
        for block in self.enc.values():
            x = run(block, x)
            skips.append(x)
        features = x.flatten(2).mT if return_features else None
        for name, block in self.dec.items():
            x = run(block, mp_cat(x, skips.pop()) if "_block" in name else x)
        sample = self.out_conv(x, self.out_gain)
        if return_dict:
            return EDM2UNet2DOutput(sample=sample, features=features)
        return (sample, features) if return_features else (sample,)
