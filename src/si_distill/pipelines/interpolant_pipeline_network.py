"""Networks of any class behind one contract: what they take and what they give.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch, diffusers and siblings.

The contract is that of this package's own models: a config with `in_channels`, `sample_size` and `num_classes` (0: labels
are ignored), the properties `null_class` and `feature_width`, and a forward that takes `return_features`. Diffusers' classes
`DiTTransformer2DModel` and `UNet2DModel` are used as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from .interpolant_condition import Condition


class NetworkView:
    """
    A network as pipelines and trainers see it; this class is that of networks which keep the contract.

    Args:
        network (`nn.Module`): what is called; it may be wrapped by `DistributedDataParallel` or `torch.compile`.

    Raises:
        ValueError: by the properties, when the network does not say what is asked.
    """

    #: What the config calls the number of classes.
    classes_name: ClassVar[str] = "num_classes"
    #: Classes of modules that two blocks share, which sharding must not put away between them.
    shared_modules: ClassVar[tuple[str, ...]] = ()

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
        return self._config(self.classes_name)

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", or None."""
        return getattr(self.bare, "null_class", None)

    @property
    def null(self) -> Condition | None:
        """One row with no class, for guidance and label dropout, or None."""
        return None if self.null_class is None else Condition(labels=torch.tensor([self.null_class]))

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
        """Channels of the image that the network sees next to x_t; 0 for none."""
        return getattr(getattr(self.bare, "config", None), "condition_channels", None) or 0

    def __call__(
        self, network_input: torch.Tensor, timesteps: torch.Tensor, condition: Condition, return_features: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """
        One forward.

        Args:
            network_input (`torch.Tensor` of shape (B, C, H, W)): x_t, as the scheduler scales it.
            timesteps (`torch.Tensor` of shape (B,)): the network's times (see `Interpolant.network_time`).
            condition (`Condition`): what else the network is told.
            return_features (`bool`): whether hidden tokens of the middle of the network are returned too.

        Returns:
            `(prediction,)` or `(prediction, features)`, (B, C, H, W) and (B, N, D).
        """
        told: dict[str, Any] = {
            "augment_labels": condition.augment,
            "condition": condition.image,
            "guidance": condition.guidance,
            "return_features": return_features or None,
        }
        told = {name: value for name, value in told.items() if value is not None} | condition.text
        return self.network(network_input, timesteps, condition.labels, return_dict=False, **told)

    def condition_image(self, reference: torch.Tensor | None, noise: torch.Tensor | None = None) -> torch.Tensor | None:
        """
        The image that the network sees next to x_t, (B, condition_channels, H, W), or None: the channels of the reference,
        then those of a bridge student's noise. An unpaired bridge's network does not take the reference.

        Args:
            reference (`torch.Tensor` of shape (B, C', H, W), *optional*): the reference image x1, or another picture.
            noise (`torch.Tensor` of shape (B, noise_channels, H, W), *optional*): standard normal noise of a student.

        Raises:
            ValueError: when the channels are not those that the network takes.
        """
        taken = self.condition_channels - (0 if noise is None else noise.shape[1])
        if not taken:
            return noise
        if reference is None:
            raise ValueError(f"This network takes a reference image of {taken} channels, and none was given.")
        if taken != reference.shape[1]:
            raise ValueError(
                f"This network takes a reference image of {taken} channels, but the one given has {reference.shape[1]}."
            )
        return reference if noise is None else torch.cat([reference, noise.to(reference)], 1)

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

    def __call__(self, network_input, timesteps, condition, return_features=False):
        found: list[torch.Tensor] = []
        with listening(self._feature_module(), found) if return_features else nullcontext():
            output = self.network(network_input, timesteps, self._labels(condition.labels), return_dict=False)[0]
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

    classes_name = "num_embeds_ada_norm"
    shared_modules = ("CombinedTimestepLabelEmbeddings",)  # the output layer uses the embedding inside the first block

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

    classes_name = "num_class_embeds"
    null_class = None

    @property
    def num_classes(self):
        if self.bare.config.class_embed_type is not None:
            raise ValueError(
                f"This UNet2DModel takes no class labels but `class_embed_type={self.bare.config.class_embed_type!r}`, "
                "which cannot be used; only `num_class_embeds` and unconditional networks can."
            )
        return self.bare.config.num_class_embeds or 0  # None of an unconditional one

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


#: Classes that do not keep the contract and the views through which they do.
VIEWS: dict[type[nn.Module], type[NetworkView]] = {DiTTransformer2DModel: _DiTView, UNet2DModel: _UNet2DView}


def view_network(network: nn.Module) -> NetworkView:
    """The view that fits a network's class; wrapped networks are seen through their wrapper."""
    return view_class(type(_bare(network)))(network)


def view_class(cls: type[nn.Module]) -> type[NetworkView]:
    """The view of a network class: its own or a base class's in `VIEWS`, else that of the contract."""
    return next((VIEWS[base] for base in cls.__mro__ if base in VIEWS), NetworkView)


def _bare(network: nn.Module) -> nn.Module:
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        elif hasattr(network, "_orig_mod"):  # torch.compile
            network = network._orig_mod
        else:
            return network


@contextmanager
def listening(module: nn.Module, found: list[torch.Tensor]) -> Iterator[None]:
    """Keeps the outputs of a submodule, with their gradients' history."""
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield
    finally:
        handle.remove()
