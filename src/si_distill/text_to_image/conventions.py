"""What each class of stock text-to-image pipelines means by its arguments: one record for each class.

A network is called here as `network(x_t, timesteps, text)` on latents (B, C, H, W); times and signs are those of the
scheduler of `path`. With them all of these networks are one field on x_t = α x0 + β x1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..conversion.diffusers_teachers import scheduler_settings
from .tokens import CHAT, CLIP, LUMINA2, QWEN, SANA, SECOND_CLIP, Reading, sana_instruction

Text = dict[str, torch.Tensor]

#: Linear layers of attention and feed-forward in blocks of two streams (SD3, Flux, Qwen-Image).
_TWO_STREAMS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Features:
    """
    The hidden tokens (B, N, D) in the middle of a network.

    Args:
        width: `width(config)` is D, of the network's config.
        blocks: the list whose middle block gives them, or the block.
        place: which of several outputs they are; None where there is one, also a map (B, D, H, W).
    """

    width: Callable[[Any], int]
    blocks: str = "transformer_blocks"
    place: int | None = None

    def module(self, network: nn.Module) -> nn.Module:
        """The block."""
        found = getattr(network, self.blocks)
        return found[max(1, len(found) // 2) - 1] if isinstance(found, nn.ModuleList) else found

    def tokens(self, output: Any) -> torch.Tensor:
        """(B, N, D) of what the block gives."""
        hidden = output if self.place is None else output[self.place]
        return hidden.flatten(2).mT if hidden.ndim == 4 else hidden


@dataclass(frozen=True)
class Convention:
    """
    One class of pipelines.

    Args:
        encode: `encode(pipeline, prompts, max_length, negative, device)` gives the text (B, …) by the names of the network's
            arguments; `max_length` None is the pipeline's own.
        call: `call(network, x_t, timesteps, text, guidance)` gives the prediction (B, C, H, W).
        text_shapes: `text_shapes(config, max_length)` gives the shapes of a text's tensors, of the network's config.
        features: where an adversarial term looks.
        path: settings of `StochasticInterpolantScheduler`, of the pipeline; by default those of a velocity on `linear`.
        network: the component that is the network.
        layers: the argument of `save_lora_weights` for it.
        patch: pixels of the autoencoder's latents that a token of the network has on each side: sizes are its multiples.
        multiple: what stock calls want sides in pixels to be a multiple of besides.
        packed: whether the network's channels are those of 2 × 2 latents.
        mask: which of the text tensors says where the text is, (B, L).
        reads_mask: whether the network reads numbers of tokens from it, for which it cannot be on the meta device.
        lora_targets: names of the linear layers that an adapter changes, by their ends.
        rescale: `rescale(guided, conditional)`, what the pipeline does after guidance.
        unguided: arguments of a call without guidance.
        scale_offset: what the pipeline's scale lacks to be the w of u + w (c − u).
        equal_steps: whether a call with N steps starts from N equal ones; the others need `sigmas`.
        told_guidance: whether networks may be told a scale (guidance-distilled).
        readings: what its tokenizers read; `mask` refers to the first one's tokens.
        most_tokens: `most_tokens(pipeline)` is the largest `max_length`; None is any.
        blank: what stands for no negative prompt.
    """

    encode: Callable[..., Text]
    call: Callable[..., torch.Tensor]
    text_shapes: Callable[[Any, int | None], dict[str, tuple[int, ...]]]
    features: Features
    path: Callable[[DiffusionPipeline], dict[str, Any]] = lambda pipeline: {"timestep_scale": 1000.0}
    network: str = "transformer"
    layers: str = "transformer_lora_layers"
    patch: int = 2
    packed: bool = False
    multiple: int = 1
    mask: str | None = None
    reads_mask: bool = False
    lora_targets: tuple[str, ...] = _TWO_STREAMS
    rescale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    scale_offset: float = 0.0
    equal_steps: bool = True
    told_guidance: bool = False
    readings: tuple[Reading, ...] = (CLIP,)
    most_tokens: Callable[[DiffusionPipeline], int] | None = None
    blank: str = ""


# Texts.


def _limited(max_length: int | None) -> dict[str, int]:
    return {} if max_length is None else {"max_sequence_length": max_length}


def _encode_sd3(pipe, prompts, max_length, negative, device) -> Text:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, device=device, **_limited(max_length)
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _encode_flux(pipe, prompts, max_length, negative, device) -> Text:
    embeds, pooled, _ = pipe.encode_prompt(prompts, prompts, device=device, **_limited(max_length))
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _encode_sana(pipe, prompts, max_length, negative, device) -> Text:
    embeds, mask, _, _ = pipe.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=device,
        complex_human_instruction=None if negative else sana_instruction(pipe),
        **_limited(max_length),
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _encode_lumina2(pipe, prompts, max_length, negative, device) -> Text:
    if negative:  # without the system prompt, which `encode_prompt` puts before every other
        embeds, mask = pipe._get_gemma_prompt_embeds(prompt=prompts, device=device, **_limited(max_length))
    else:
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, **_limited(max_length)
        )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _encode_qwen(pipe, prompts, max_length, negative, device) -> Text:
    embeds, mask = pipe.encode_prompt(prompts, device=device, **_limited(max_length))
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def _encode_z_image(pipe, prompts, max_length, negative, device) -> Text:
    # A copy: `encode_prompt` writes its chat template into the caller's list.
    ragged, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, device=device, **_limited(max_length)
    )
    lengths = torch.tensor([len(each) for each in ragged], device=ragged[0].device)
    embeds = nn.utils.rnn.pad_sequence(ragged, batch_first=True)
    return {"cap_feats": embeds, "mask": torch.arange(embeds.shape[1], device=lengths.device) < lengths[:, None]}


def _encode_sd(pipe, prompts, max_length, negative, device) -> Text:
    embeds, _ = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _encode_sdxl(pipe, prompts, max_length, negative, device) -> Text:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    if negative and pipe.config.force_zeros_for_empty_prompt and not any(prompts):
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _sequence(name: str, width: str, longest: int, mask: str | None = None, **pooled: str):
    """Shapes of embeddings (L, D) and what goes with them; D and the widths of pooled ones are of the network's config."""

    def shapes(config: Any, max_length: int | None) -> dict[str, tuple[int, ...]]:
        length = max_length or longest
        found = {name: (length, config[width]), **{key: (config[value],) for key, value in pooled.items()}}
        return found if mask is None else {**found, mask: (length,)}

    return shapes


def _sd3_shapes(config: Any, max_length: int | None) -> dict[str, tuple[int, ...]]:
    length = 77 + (max_length or 256)  # CLIP's and T5's
    width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    return {"encoder_hidden_states": (length, width), "pooled_projections": (pooled,)}


def _sdxl_shapes(config: Any, max_length: int | None) -> dict[str, tuple[int, ...]]:
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"encoder_hidden_states": (77, config["cross_attention_dim"]), "text_embeds": (pooled,)}


# Networks.


def _call_sd3(network, x_t, timesteps, text, guidance):
    return network(x_t, timestep=timesteps, return_dict=False, **text)[0]


def _call_sana(network, x_t, timesteps, text, guidance):
    return network(x_t, timestep=timesteps, return_dict=False, **text)[0][:, : x_t.shape[1]]  # the rest: a variance


def _call_z_image(network, x_t, timesteps, text, guidance):
    texts = [embeds[mask] for embeds, mask in zip(text["cap_feats"], text["mask"], strict=True)]
    return torch.stack(network(list(x_t.unsqueeze(2)), timesteps, texts, return_dict=False)[0]).squeeze(2)


def _pack(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) latents as tokens (B, H/2 · W/2, 4 C)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def _unpack(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    b, c, h, w = like.shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def _call_flux(network, x_t, timesteps, text, guidance):
    height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
    places = torch.zeros(height, width, 3, device=x_t.device, dtype=x_t.dtype)
    places[..., 1] += torch.arange(height, device=x_t.device)[:, None]
    places[..., 2] += torch.arange(width, device=x_t.device)
    text_places = torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=x_t.device, dtype=x_t.dtype)
    tokens = network(
        _pack(x_t),
        timestep=timesteps,
        guidance=guidance if network.config.guidance_embeds else None,
        img_ids=places.flatten(0, 1),
        txt_ids=text_places,
        return_dict=False,
        **text,
    )[0]
    return _unpack(tokens, x_t)


def _call_qwen(network, x_t, timesteps, text, guidance):
    shapes = [[(1, x_t.shape[2] // 2, x_t.shape[3] // 2)]] * len(x_t)
    return _unpack(network(_pack(x_t), timestep=timesteps, img_shapes=shapes, return_dict=False, **text)[0], x_t)


def _call_sd(network, x_t, timesteps, text, guidance):
    return network(x_t, timesteps, return_dict=False, **text)[0]


def _call_sdxl(network, x_t, timesteps, text, guidance):
    # The factor from latents to pixels is 8 in every autoencoder of SDXL: original size, no crop, this size.
    height, width = 8 * x_t.shape[2], 8 * x_t.shape[3]
    sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=x_t.dtype).expand(len(x_t), 6)
    added = {"text_embeds": text["text_embeds"], "time_ids": sizes}
    return network(
        x_t,
        timesteps,
        encoder_hidden_states=text["encoder_hidden_states"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


# Guidance: some pipelines give the guided prediction the norm of the conditional one.


def _norm_of_rows(guided: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Lumina2's: over the last axis."""
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _norm_of_tokens(guided: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Qwen-Image's: over the values of a token."""
    tokens, wanted = _pack(guided), _pack(conditional)
    return _unpack(_norm_of_rows(tokens, wanted), guided)


def _noise_levels(pipeline: DiffusionPipeline) -> dict[str, Any]:
    return scheduler_settings(pipeline.scheduler)


def _to_the_image(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Of networks whose time is 1 at the image, and which predict x0 − x1."""
    return {"reversed_time": True, "prediction_sign": -1}


def _z_image_tokens(pipeline: DiffusionPipeline) -> int:
    """Texts are filled up to a multiple of 32, and images have their places after them."""
    return pipeline.transformer.config.axes_lens[0] - 32


def _heads(config: Any) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


_IMAGE_STREAM = Features(_heads, place=1)  # blocks give the text's tokens, then the image's
_UNET: dict[str, Any] = dict(network="unet", layers="unet_lora_layers", patch=1, lora_targets=_ATTENTION)
_MIDDLE = Features(lambda config: config["block_out_channels"][-1], "mid_block")

CONVENTIONS = {
    "StableDiffusion3Pipeline": Convention(
        _encode_sd3,
        _call_sd3,
        _sd3_shapes,
        _IMAGE_STREAM,
        equal_steps=False,
        readings=(CLIP, SECOND_CLIP, Reading("tokenizer_3")),
        most_tokens=lambda pipeline: 512,
    ),
    "SanaPipeline": Convention(
        _encode_sana,
        _call_sana,
        _sequence("encoder_hidden_states", "caption_channels", 300, "encoder_attention_mask"),
        Features(_heads),
        lambda pipeline: {"timestep_scale": 1000.0 * pipeline.transformer.config.timestep_scale},
        patch=1,
        mask="encoder_attention_mask",
        lora_targets=_ATTENTION,
        unguided={"guidance_scale": 1.0, "use_resolution_binning": False},
        multiple=32,
        equal_steps=False,
        readings=(SANA,),
    ),
    "FluxPipeline": Convention(
        _encode_flux,
        _call_flux,
        _sequence("encoder_hidden_states", "joint_attention_dim", 512, pooled_projections="pooled_projection_dim"),
        _IMAGE_STREAM,
        lambda pipeline: {},
        packed=True,
        lora_targets=(*_TWO_STREAMS, "proj_mlp", "proj_out"),
        unguided={},
        told_guidance=True,
        readings=(CLIP, Reading("tokenizer_2")),
        most_tokens=lambda pipeline: 512,
    ),
    "QwenImagePipeline": Convention(
        _encode_qwen,
        _call_qwen,
        _sequence("encoder_hidden_states", "joint_attention_dim", 512, "encoder_hidden_states_mask"),
        _IMAGE_STREAM,
        lambda pipeline: {},
        packed=True,
        mask="encoder_hidden_states_mask",
        rescale=_norm_of_tokens,
        unguided={"true_cfg_scale": 1.0},
        readings=(QWEN,),
        most_tokens=lambda pipeline: 1024,
        blank=" ",
    ),
    "Lumina2Pipeline": Convention(
        _encode_lumina2,
        _call_sd3,
        _sequence("encoder_hidden_states", "cap_feat_dim", 256, "encoder_attention_mask"),
        Features(lambda config: config["hidden_size"], "layers"),
        _to_the_image,
        mask="encoder_attention_mask",
        reads_mask=True,
        lora_targets=(*_ATTENTION, "linear_1", "linear_2", "linear_3"),
        rescale=_norm_of_rows,
        readings=(LUMINA2,),
        most_tokens=lambda pipeline: pipeline.transformer.config.axes_lens[0] - 1,  # the image has the place after it
    ),
    "ZImagePipeline": Convention(
        _encode_z_image,
        _call_z_image,
        _sequence("cap_feats", "cap_feat_dim", 512, "mask"),
        Features(lambda config: config["dim"], "layers"),
        _to_the_image,
        mask="mask",
        reads_mask=True,
        lora_targets=(*_ATTENTION, "w1", "w2", "w3"),
        unguided={"guidance_scale": 0.0},
        scale_offset=1.0,
        readings=(CHAT,),
        most_tokens=_z_image_tokens,
    ),
    "StableDiffusionPipeline": Convention(
        _encode_sd,
        _call_sd,
        lambda config, max_length: {"encoder_hidden_states": (77, config["cross_attention_dim"])},
        _MIDDLE,
        _noise_levels,
        **_UNET,
    ),
    "StableDiffusionXLPipeline": Convention(
        _encode_sdxl,
        _call_sdxl,
        _sdxl_shapes,
        _MIDDLE,
        _noise_levels,
        **_UNET,
        readings=(CLIP, SECOND_CLIP),
    ),
}
