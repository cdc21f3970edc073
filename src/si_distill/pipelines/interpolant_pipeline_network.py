"""Networks of any class behind one contract: what they take, what they give, and their guided forward.

A copy of this file travels beside `pipeline.py` into every saved pipeline: it imports only torch and diffusers.

The contract is that of this package's own models: a config with `in_channels`, `sample_size` and `num_classes` (0: labels
are ignored), the properties `null_class` and `feature_width`, and a forward that takes `return_features`. Diffusers' classes
`DiTTransformer2DModel` and `UNet2DModel` are used as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn


class NetworkView:
    """
    A network as pipelines and trainers see it; this class is that of networks which keep the contract.

    Args:
        network (`nn.Module`): what is called; it may be wrapped by `DistributedDataParallel` or `torch.compile`.

    Raises:
        ValueError: by the properties, when the network does not say what is asked.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.bare = _bare(network)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample: square images or latents."""
        size = self._config("sample_size")
        if not isinstance(size, int):
            height, width = size
            if height != width:
                raise ValueError(f"The network makes images of {height}×{width} values; only square ones can be used.")
            size = height
        return (self._config("in_channels"), size, size)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unconditional network."""
        return self._config("num_classes")

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", or None."""
        return getattr(self.bare, "null_class", None)

    @property
    def feature_width(self) -> int:
        """D of the features (B, N, D)."""
        width = getattr(self.bare, "feature_width", None)
        if width is None:
            raise ValueError(
                f"A {type(self.bare).__name__} gives no features, which an adversarial term needs: no `feature_width`."
            )
        return width

    @property
    def feature_size(self) -> int:
        """Height and width of the map that the features are: N is its square."""
        size = getattr(self.bare, "feature_size", None)
        if size is None:
            raise ValueError(
                f"A {type(self.bare).__name__} does not say of what size the map of its features is: no `feature_size`."
            )
        return size

    @property
    def augment_dim(self) -> int | None:
        """Number of augmentation labels; 0 when it was built without, None for a class that cannot take any."""
        return getattr(getattr(self.bare, "config", None), "augment_dim", None)

    @property
    def condition_channels(self) -> int:
        """Channels of the image that the network sees beside x_t; 0 for none."""
        return getattr(getattr(self.bare, "config", None), "condition_channels", None) or 0

    def __call__(
        self,
        network_input: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        return_features: bool = False,
        augment_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        One forward.

        Args:
            network_input (`torch.Tensor` of shape (B, C, H, W)): x_t, as the scheduler scales it.
            timesteps (`torch.Tensor` of shape (B,)): the network's times (see `Interpolant.network_time`).
            class_labels (`torch.LongTensor` of shape (B,), *optional*): classes; ignored by unconditional networks.
            return_features (`bool`): whether hidden tokens of the middle of the network are returned too.
            augment_labels (`torch.Tensor` of shape (B, augment_dim), *optional*): what augmentation did to the images.
            condition (`torch.Tensor` of shape (B, condition_channels, H, W), *optional*): the image beside x_t.

        Returns:
            `(prediction,)` or `(prediction, features)`, (B, C, H, W) and (B, N, D).
        """
        extra: dict[str, Any] = {"return_features": True} if return_features else {}
        if augment_labels is not None:
            extra["augment_labels"] = augment_labels
        if condition is not None:
            extra["condition"] = condition
        return self.network(network_input, timesteps, class_labels, return_dict=False, **extra)

    def _config(self, name: str) -> Any:
        value = getattr(getattr(self.bare, "config", None), name, None)
        if value is None:
            raise ValueError(
                f"A {type(self.bare).__name__} has no `{name}` in its config. Networks need `in_channels`, `sample_size` "
                "and `num_classes` (0 without classes) there, or are diffusers' DiTTransformer2DModel or UNet2DModel."
            )
        return value


class _DiffusersView(NetworkView):
    """Features are read by a hook during the forward; channels of a learned variance are dropped."""

    def __call__(self, network_input, timesteps, class_labels, return_features=False):
        found: list[torch.Tensor] = []
        with _listening(self._feature_module(), found) if return_features else nullcontext():
            output = self.network(network_input, timesteps, self._labels(class_labels), return_dict=False)[0]
        prediction = output[:, : network_input.shape[1]]
        return (prediction, self._tokens(found[0])) if return_features else (prediction,)

    def _labels(self, class_labels):
        return class_labels

    def _feature_module(self) -> nn.Module:
        raise NotImplementedError

    def _tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class _DiTView(_DiffusersView):
    """Features are the tokens after block depth/2; the label after the last class is the null class."""

    @property
    def num_classes(self):
        return self._config("num_embeds_ada_norm")

    @property
    def null_class(self):
        return self.num_classes

    @property
    def feature_width(self):
        return self.bare.inner_dim

    @property
    def feature_size(self):
        return self._config("sample_size") // self._config("patch_size")

    def _labels(self, class_labels):
        for block in self.bare.transformer_blocks:
            # In training each block would drop labels on its own; label dropout is drawn by the trainer.
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        return class_labels

    def _feature_module(self):
        return self.bare.transformer_blocks[max(1, len(self.bare.transformer_blocks) // 2) - 1]


class _UNet2DView(_DiffusersView):
    """Features are the positions of the middle block's map."""

    null_class = None

    @property
    def num_classes(self):
        if self.bare.config.class_embed_type is not None:
            raise ValueError(
                f"This UNet2DModel takes no class labels but `class_embed_type={self.bare.config.class_embed_type!r}`, "
                "which cannot be used; only `num_class_embeds` and unconditional networks can."
            )
        return self.bare.config.num_class_embeds or 0

    @property
    def feature_width(self):
        self._feature_module()
        return self.bare.config.block_out_channels[-1]

    @property
    def feature_size(self):
        return self.sample_shape[-1] >> (len(self.bare.config.block_out_channels) - 1)

    def _labels(self, class_labels):
        return class_labels if self.num_classes else None

    def _feature_module(self):
        if self.bare.mid_block is None:
            raise ValueError("This UNet2DModel has no middle block, whose map an adversarial term looks at.")
        return self.bare.mid_block

    def _tokens(self, hidden):
        return hidden.flatten(2).transpose(1, 2)


_VIEWS = {DiTTransformer2DModel: _DiTView, UNet2DModel: _UNet2DView}


def view_network(network: nn.Module) -> NetworkView:
    """The view that fits a network's class; wrapped networks are seen through their wrapper."""
    bare = _bare(network)
    return next((view for cls, view in _VIEWS.items() if isinstance(bare, cls)), NetworkView)(network)


def network_condition(
    network: nn.Module, reference: torch.Tensor | None, noise: torch.Tensor | None = None
) -> torch.Tensor | None:
    """
    What a network sees beside x_t, (B, condition_channels, H, W), or None: the channels of the reference image, then those
    of a bridge student's noise. An unpaired bridge's network does not take the reference.

    Args:
        network: whose `condition_channels` say what it takes (see `NetworkView`).
        reference (`torch.Tensor` of shape (B, C', H, W), *optional*): the reference image x1, or another condition.
        noise (`torch.Tensor` of shape (B, noise_channels, H, W), *optional*): standard normal noise of a student.

    Raises:
        ValueError: when the channels are not those that the network takes.
    """
    channels = view_network(network).condition_channels
    noise_channels = 0 if noise is None else noise.shape[1]
    if channels == noise_channels:
        return noise
    if reference is None:
        raise ValueError(
            f"This network takes a reference image of {channels - noise_channels} channels, and none was given."
        )
    if channels != reference.shape[1] + noise_channels:
        raise ValueError(
            f"This network takes a reference image of {channels - noise_channels} channels, but the one given has "
            f"{reference.shape[1]}."
        )
    return reference if noise is None else torch.cat([reference, noise.to(reference)], 1)


def _bare(network: nn.Module) -> nn.Module:
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):  # torch.compile
            network = network._orig_mod
        else:
            return network


@contextmanager
def _listening(module: nn.Module, found: list[torch.Tensor]) -> Iterator[None]:
    """Keeps the outputs of a submodule, with their gradients' history."""
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield
    finally:
        handle.remove()


def guided_outputs(
    network: nn.Module,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None,
    null_class: int | None,
    guidance_scale: float | torch.Tensor = 1.0,
    augment_labels: torch.Tensor | None = None,
    guidance_channels: int | None = None,
    condition: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """
    Classifier-free guidance in one forward: v_∅ + w (v_y − v_∅), with w = 1 a plain forward of B rows.

    The weights of the two predictions sum to 1, so the formula is the same for every kind of prediction.

    Args:
        network: called once (see `NetworkView`); gives a tuple.
        x_t (`torch.Tensor` of shape (B, C, H, W)): its input.
        timesteps (`torch.Tensor` of shape (B,)): the network's times.
        class_labels (`torch.LongTensor` of shape (B,), *optional*): the classes y; None of an unconditional network.
        null_class (`int`, *optional*): the label that means "no class".
        guidance_scale (`float`, or `torch.Tensor` of shape (B,)): w; 0 ignores the class, 1 is no guidance.
        augment_labels (`torch.Tensor` of shape (B, augment_dim), *optional*): what augmentation did to `x_t`.
        guidance_channels (`int`, *optional*): guides only the first channels of the prediction; None is all of them.
        condition (`torch.Tensor` of shape (B, condition_channels, H, W), *optional*): the image that the network sees
            beside x_t, with the class and without.

    Returns:
        The network's tuple: first the guided prediction of the shape of `x_t`; anything else as it is for the classes y.

    Raises:
        ValueError: when guidance is asked of a network without a null class.
    """
    view = view_network(network)
    told = {"augment_labels": augment_labels, "condition": condition}
    told = {name: value for name, value in told.items() if value is not None}
    if not torch.is_tensor(guidance_scale) and guidance_scale == 1:
        return view(x_t, timesteps, class_labels, **told)
    if null_class is None:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but the network was trained without label dropout, or without labels, "
            "and has no null class to guide with. Use `guidance_scale=1.0`, or train it with `class_dropout_prob` above 0."
        )
    labels = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
    told = {name: torch.cat([value, value]) for name, value in told.items()}
    outputs = view(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), labels, **told)
    conditional, unconditional = outputs[0].chunk(2)
    if torch.is_tensor(guidance_scale):
        guidance_scale = guidance_scale.to(conditional.dtype).view(-1, *[1] * (x_t.ndim - 1))
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_channels is not None:
        guided = torch.cat([guided[:, :guidance_channels], conditional[:, guidance_channels:]], 1)
    return guided, *(None if extra is None else extra.chunk(2)[0] for extra in outputs[1:])
