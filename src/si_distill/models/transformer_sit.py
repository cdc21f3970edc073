"""The SiT network (Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers"), a DiT (Peebles & Xie 2023) on continuous times, as a Diffusers model.

This file travels into the transformer folder of every saved pipeline: it imports only torch and diffusers, and no
sibling, which diffusers would not fetch from the Hub.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin

#: (layers, heads, width of a head) of the published sizes (DiT, table 1); any of them comes with patches of 2, 4 and 8.
SIT_SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
SIT_PRESETS = {f"SiT-{size}/{patch}": (*shape, patch) for size, shape in SIT_SIZES.items() for patch in (2, 4, 8)}


@dataclass
class SiTTransformer2DModelOutput(Transformer2DModelOutput):
    """
    Output of `SiTTransformer2DModel`.

    Args:
        sample (`torch.Tensor` of shape (B, C, H, W)): the prediction.
        features (`torch.Tensor` of shape (B, N, D), *optional*): hidden tokens after the middle block.
    """

    features: torch.Tensor | None = None


#: Longest sequence whose attention `SiTAttnProcessor` trains by plain products on CPUs: beyond it the scores, which the
#: fused kernel never stores, take more time in memory than the products save.
PRODUCT_TOKENS = 256


class AttentionScores(torch.autograd.Function):
    """
    query · keyᵀ / √D of bfloat16 tensors (…, N, D), kept in float32 (…, N, N): rounded, the softmax would multiply their
    error. The products of the backward pass are bfloat16's, as in fused kernels.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return (query.float() * query.shape[-1] ** -0.5) @ key.float().transpose(-1, -2)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = ctx.saved_tensors
        gradient = (gradient * query.shape[-1] ** -0.5).to(query.dtype)
        return gradient @ key, gradient.transpose(-1, -2) @ query


def attention_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of bfloat16 tensors (B, N, H, D), as accurate as the fused kernel."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = AttentionScores.apply(query, key).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2)


class SiTAttnProcessor:
    """
    Self-attention through diffusers' dispatcher, so that `set_attention_backend` works.

    Where no backend is set, training in bfloat16 on a CPU takes `attention_by_products`: torch's fused kernel there (2.15,
    without AMX) is no faster in bfloat16 than in float32, and the products are, forward and backward; forward alone they
    are where a compiler fuses what is between them.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if self._attention_backend is None and self._is_faster_by_products(query):
            hidden_states = attention_by_products(query, key, value)
        else:
            hidden_states = dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states))

    @staticmethod
    def _is_faster_by_products(query: torch.Tensor) -> bool:
        if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.shape[1] > PRODUCT_TOKENS:
            return False
        return query.requires_grad or torch.compiler.is_compiling()


class SiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases on all projections."""

    _default_processor_cls = SiTAttnProcessor
    _available_processors = [SiTAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__()
        inner_dim = heads * head_dim
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True
        self.is_cross_attention = False
        self.added_kv_proj_dim = None
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class SiTTransformerBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SiTAttention(dim, heads, head_dim, dropout)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        mlp_dim = int(dim * mlp_ratio)
        self.ff = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, N, D), conditioning (B, D) before its SiLU."""
        modulation = self.modulation(F.silu(conditioning)).unsqueeze(1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)
        hidden_states = hidden_states + gate_attn * self.attn(self.norm1(hidden_states) * (1 + scale_attn) + shift_attn)
        return hidden_states + gate_ff * self.ff(self.norm2(hidden_states) * (1 + scale_ff) + shift_ff)


class SiTTransformer2DModel(
    ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, AttentionMixin, CacheMixin
):
    """
    SiT: patches, transformer blocks with adaLN-Zero conditioning on time and class, patches back to an image.

    Args:
        sample_size (`int`): height and width of the (latent) image.
        patch_size (`int`): side of a patch; divides `sample_size`.
        in_channels (`int`): channels C of the (latent) image.
        num_layers (`int`): number of blocks.
        num_attention_heads (`int`), attention_head_dim (`int`): their product is the width D.
        mlp_ratio (`float`): width of the MLP over D.
        num_classes (`int`): number of classes; labels are 0 … num_classes − 1. 0 is an unconditional network.
        class_dropout_prob (`float`): share of labels that the teacher's training replaces by the null class. Above 0
            the label `num_classes` exists and means "no class", which guidance needs; the trainer draws the dropout.
        learn_sigma (`bool`): the last layer has 2 C channels as in the published checkpoints; `.sample` is the first C.
        timestep_scale (`float`): the time embedding is cos and sin of t · timestep_scale · f with f ≤ 1. SiT uses 1;
            a tiny network on t in [0, 1] learns faster with 100.
        dropout (`float`): after attention and MLP, in training. SiT uses none.
        augment_dim (`int`): number of augmentation labels that the network can be told (EDM's 9), by a linear map next to
            the class, zero at first. 0 is none.
        condition_channels (`int`): channels of an image that the network sees next to x_t (a reference, the student's
            noise), by a patch embedding of its own that is zero at first. 0 is none.
        learned_positions (`bool`): whether the position embedding, sines at first, is a parameter. SiT's is fixed; the
            public code of si-adistill trains it.

    Raises:
        ValueError: when `patch_size` does not divide `sample_size`, or the width is not a multiple of 4 (2-D positions).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTTransformerBlock"]
    _repeated_blocks = ["SiTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        timestep_scale: float = 1.0,
        dropout: float = 0.0,
        augment_dim: int = 0,
        condition_channels: int = 0,
        learned_positions: bool = False,
    ):
        super().__init__()
        sizes = (sample_size, patch_size, in_channels, num_attention_heads, attention_head_dim)
        optional = (num_layers, num_classes, augment_dim, condition_channels)
        if min(sizes) < 1 or max(sizes) > 65536 or num_layers > 1000 or not 0 < mlp_ratio <= 1000 or min(optional) < 0:
            raise ValueError(
                f"The network's sizes {sizes}, `mlp_ratio` {mlp_ratio} and numbers of layers and optional inputs "
                f"{optional} are out of range: sizes are 1 to 65,536, the ratio above 0, at most 1,000, layers 0 to 1,000."
            )
        if not 0 <= class_dropout_prob <= 1 or not 0 < timestep_scale <= 1e6:
            raise ValueError(
                f"`class_dropout_prob` must lie in [0, 1], got {class_dropout_prob}, and `timestep_scale` in (0, 1e6], got "
                f"{timestep_scale}."
            )
        if sample_size % patch_size:
            raise ValueError(f"`patch_size` {patch_size} does not divide `sample_size` {sample_size}.")
        dim = num_attention_heads * attention_head_dim
        if dim % 4:
            raise ValueError(
                f"The width num_attention_heads * attention_head_dim = {dim} must be a multiple of 4 for 2-D positions."
            )
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        if learned_positions:
            sines = self.pos_embed.pos_embed
            del self.pos_embed.pos_embed
            self.pos_embed.pos_embed = nn.Parameter(sines)
        # Next to `pos_embed.proj`, not more channels of it: with zeros the sum is x_t's own embedding to the last bit.
        self.condition_embed = (
            nn.Conv2d(condition_channels, dim, patch_size, stride=patch_size, bias=False)
            if condition_channels
            else None
        )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=timestep_scale)
        self.time_embed = TimestepEmbedding(256, dim)
        self.class_embed = nn.Embedding(num_classes + (class_dropout_prob > 0), dim) if num_classes else None
        self.augment_embed = nn.Linear(augment_dim, dim, bias=False) if augment_dim else None
        self.transformer_blocks = nn.ModuleList(
            SiTTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, dropout)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self._initialize_weights()

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "SiTTransformer2DModel":
        """
        A randomly initialised network of a published size, e.g. `from_preset("SiT-XL/2", sample_size=64)`.

        Args:
            preset (`str`): SiT-S, B, L or XL, a slash and the patch size 2, 4 or 8.
            overrides: other constructor arguments.
        """
        if preset not in SIT_PRESETS:
            raise ValueError(f"Unknown preset {preset!r}. Choose one of: {', '.join(SIT_PRESETS)}.")
        num_layers, heads, head_dim, patch_size = SIT_PRESETS[preset]
        shape = dict(num_layers=num_layers, num_attention_heads=heads, attention_head_dim=head_dim)
        return cls(**{**shape, "patch_size": patch_size, **overrides})

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", or None for a network without classes or trained without label dropout."""
        config = self.config
        return config.num_classes if config.num_classes and config.class_dropout_prob > 0 else None

    @property
    def feature_width(self) -> int:
        """D of the features that `forward` returns."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def feature_size(self) -> int:
        """Height and width of the map that the features are."""
        return self.config.sample_size // self.config.patch_size

    def _initialize_weights(self) -> None:
        """DiT's initialisation: Xavier projections, normal embeddings (0.02), zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for layer in (self.class_embed, self.time_embed.linear_1, self.time_embed.linear_2):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.transformer_blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.augment_embed, self.condition_embed):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        return_features: bool = False,
        augment_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> SiTTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): x_t with H = W = `sample_size`.
            timestep (`torch.Tensor` of shape (B,) or a number): t in [0, 1], 0 = data. Keep it in float32.
            class_labels (`torch.LongTensor` of shape (B,), *optional*): classes; `null_class` means none. A network
                without classes ignores them.
            return_dict (`bool`): whether to return an output object or a tuple.
            return_features (`bool`): whether to return the hidden tokens after block depth/2 too, (B, N, D): what an
                adversarial term looks at.
            augment_labels (`torch.Tensor` of shape (B, augment_dim), *optional*): what augmentation did to the images;
                None and zeros mean nothing.
            condition (`torch.Tensor` of shape (B, condition_channels, H, W), *optional*): the image next to x_t.

        Returns:
            `SiTTransformer2DModelOutput` whose `sample` has the shape of `hidden_states`, or a tuple of its fields.

        Raises:
            ValueError: for an image that is not (C, sample_size, sample_size), no labels where there are classes, or
                augmentation labels or a condition that do not fit.
        """
        size, patch_size = self.config.sample_size, self.config.patch_size
        if hidden_states.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"This SiT takes square images of shape (batch, {self.config.in_channels}, {size}, {size}), got "
                f"{tuple(hidden_states.shape)}. Its positions are fixed: crop or resize, or build another network."
            )
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
        condition = self._checked_condition(condition, hidden_states)
        hidden_states = self.pos_embed(hidden_states)
        if condition is not None:
            hidden_states = hidden_states + self.condition_embed(condition).flatten(2).transpose(1, 2)
        # A convolution leaves the width before the tokens in memory, and all blocks would keep it so and transpose it.
        hidden_states = hidden_states.contiguous()
        conditioning = self.time_embed(self.time_proj(timestep).to(hidden_states.dtype))
        if self.class_embed is not None:
            if class_labels is None:
                raise ValueError(
                    f"This SiT has {self.config.num_classes} classes: pass `class_labels`, one for each image."
                )
            conditioning = conditioning + self.class_embed(class_labels)
        augment_dim = self.config.augment_dim
        if augment_labels is not None and augment_labels.shape != (len(conditioning), augment_dim):
            raise ValueError(
                f"`augment_labels` has shape {tuple(augment_labels.shape)}, but this SiT (augment_dim {augment_dim}) takes "
                f"({len(conditioning)}, {augment_dim})."
            )
        if augment_dim:
            # Zeros go through the map too: distributed training expects every parameter in every forward.
            zeros = conditioning.new_zeros(len(conditioning), augment_dim)
            labels = zeros if augment_labels is None else augment_labels.to(conditioning.dtype)
            conditioning = conditioning + self.augment_embed(labels)

        features = None
        for index, block in enumerate(self.transformer_blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)
            if return_features and index == max(1, len(self.transformer_blocks) // 2):
                features = hidden_states

        shift, scale = self.modulation_out(F.silu(conditioning)).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        grid = size // patch_size
        image = hidden_states.unflatten(1, (grid, grid)).unflatten(-1, (patch_size, patch_size, self.out_channels))
        image = image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        sample = image[:, : self.config.in_channels].contiguous()
        if return_dict:
            return SiTTransformer2DModelOutput(sample=sample, features=features)
        return (sample, features) if return_features else (sample,)

    def _checked_condition(self, condition: torch.Tensor | None, x_t: torch.Tensor) -> torch.Tensor | None:
        """The condition in the dtype of x_t."""
        channels = self.config.condition_channels
        found = None if condition is None else tuple(condition.shape)
        wanted = (len(x_t), channels, *x_t.shape[2:]) if channels else None
        if found != wanted:
            raise ValueError(
                f"This SiT takes {f'a `condition` (the reference image) of shape {wanted}' if wanted else 'no `condition`'} "
                f"next to x_t of shape {tuple(x_t.shape)}, got {found or 'none'}."
            )
        return None if condition is None else condition.to(x_t.dtype)
