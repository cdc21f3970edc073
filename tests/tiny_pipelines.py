"""Small random text-to-image pipelines of stock classes, built without any download."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

#: The template of Qwen's chats, with what its pipelines cut off.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRINTABLE = [chr(code) for code in range(33, 127)]


def tokenizer(cls: type[PreTrainedTokenizerBase], max_length: int) -> PreTrainedTokenizerBase:
    """Characters or bytes as tokens. None is trained: ties are broken by hash order, differently in every process."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if cls is T5Tokenizer:
        marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        return cls(vocab=[*marks, *((letter, -3.0) for letter in PRINTABLE)], extra_ids=0, model_max_length=max_length)
    if cls is CLIPTokenizer:
        words = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    elif cls is GemmaTokenizer:
        codes = [f"<0x{code:02X}>" for code in range(256)]
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *codes, "\u2581", *PRINTABLE]
    else:
        words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    # Without a length padding to the longest would be to 1e30.
    made = cls(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=max_length)
    if cls is Qwen2Tokenizer:
        made.chat_template = CHAT
    return made


def clip(tokens: CLIPTokenizer, cls: type[nn.Module] = CLIPTextModelWithProjection) -> nn.Module:
    """The pooled output is read at the tokenizer's end; its number must be the config's."""
    sizes = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, projection_dim=32)
    ends = dict(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    return cls(CLIPTextConfig(vocab_size=600, max_position_embeddings=77, **sizes, **ends))


def t5(hidden: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=400, d_model=hidden, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def gemma() -> Gemma2Model:
    sizes = dict(head_dim=8, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    return Gemma2Model(Gemma2Config(num_hidden_layers=2, vocab_size=400, attn_implementation="eager", **sizes))


def autoencoder(blocks: int = 2, shift_factor: float | None = 0.0609) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift_factor,
        scaling_factor=1.5035,
    )


def flow(**settings: object) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    tokens = tokenizer(CLIPTokenizer, 77)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder(),
        text_encoder=clip(tokens),
        tokenizer=tokens,
        text_encoder_2=clip(tokens),
        tokenizer_2=tokens,
        text_encoder_3=t5(64),
        tokenizer_3=tokenizer(T5Tokenizer, 77),
    )


def flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    tokens = tokenizer(CLIPTokenizer, 77)
    return FluxPipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=clip(tokens, CLIPTextModel),
        tokenizer=tokens,
        text_encoder_2=t5(32),
        tokenizer_2=tokenizer(T5Tokenizer, 512),
    )


def sana() -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=vae,
        text_encoder=gemma(),
        tokenizer=tokenizer(GemmaTokenizer, 2000),
    )


def lumina2() -> DiffusionPipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(shift=6.0),
        vae=autoencoder(4),
        text_encoder=gemma(),
        tokenizer=tokenizer(GemmaTokenizer, 256),
    )


def qwen() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    rope = dict(mrope_section=[1, 1, 2], rope_type="default", type="default")
    texts = dict(
        num_key_value_heads=2, vocab_size=600, rope_theta=1e6, bos_token_id=0, eos_token_id=0, rope_scaling=rope
    )
    config = Qwen2_5_VLConfig(
        text_config={**sizes, **texts},
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        vision_end_token_id=599,
        vision_start_token_id=598,
        vision_token_id=597,
        image_token_id=596,
        video_token_id=595,
    )
    return QwenImagePipeline(
        transformer=transformer,
        # The values of Qwen/Qwen-Image.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(Qwen2Tokenizer, 1024),
    )


def z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    encoder = Qwen3Model(
        Qwen3Config(num_key_value_heads=2, vocab_size=600, max_position_embeddings=512, **sizes, **ends)
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer(Qwen2Tokenizer, 512),
    )


def unet(**settings: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )


def ddim() -> DDIMScheduler:
    """Stable Diffusion's noise levels, with the spacing under which one step starts at pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def sd15() -> DiffusionPipeline:
    tokens = tokenizer(CLIPTokenizer, 77)
    return StableDiffusionPipeline(
        unet=unet(cross_attention_dim=32),
        scheduler=ddim(),
        vae=autoencoder(4, shift_factor=None),
        text_encoder=clip(tokens, CLIPTextModel),
        tokenizer=tokens,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> DiffusionPipeline:
    tokens = tokenizer(CLIPTokenizer, 77)
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=ddim(),
        vae=autoencoder(4, shift_factor=None),
        text_encoder=clip(tokens, CLIPTextModel),
        tokenizer=tokens,
        text_encoder_2=clip(tokens),
        tokenizer_2=tokens,
        force_zeros_for_empty_prompt=True,
    )


FLOWS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "lumina2": lumina2,
    "qwen": qwen,
    "z_image": z_image,
}
ALL = {**FLOWS, "sd15": sd15, "sdxl": sdxl}


def randomize(network: nn.Module) -> None:
    """Weights of which none is zero: with zero output layers every prediction would be."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2 or "pad_token" in name:
            width = 25 if parameter.ndim < 2 else max(1, parameter[0].numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5


def build(name: str) -> DiffusionPipeline:
    """The pipeline of this name, in float32 and evaluation mode, always the same."""
    torch.manual_seed(0)
    pipeline = ALL[name]()
    randomize(pipeline.unet if name in ("sd15", "sdxl") else pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def save_clip(folder: Path) -> None:
    """A CLIP of random weights, for scores."""
    torch.manual_seed(0)
    tokens = tokenizer(CLIPTokenizer, 77)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ends = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = dict(vocab_size=600, max_position_embeddings=77, **ends, **sizes)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=dict(image_size=16, patch_size=8, **sizes), projection_dim=8)
    ).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokens).save_pretrained(folder)
