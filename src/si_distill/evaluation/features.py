"""Feature extractors: torch-fidelity's own, pixels, and any class that the user names by its import path."""

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from .. import fingerprints
from ..errors import InputError
from ..imports import import_named

#: Name under which torch-fidelity knows the pixel features; no weights, so nothing to hash.
PIXELS = "si-distill-pixels"
INCEPTION = "inception-v3-compat"
#: Short names; every name in torch-fidelity's registry works as well.
ALIASES = {"pixels": PIXELS, "dinov2": "dinov2-vit-l-14", "clip": "clip-vit-b-32"}


class PixelFeatures(FeatureExtractorBase):
    """The image itself: uint8 / 127.5 − 1, flattened, float64. Of use for small images such as the digits only."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "pixels"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Images (B, C, H, W), uint8, to features (B, C·H·W)."""
        return (images.flatten(1).double() / 127.5 - 1,)


register_feature_extractor(PIXELS, PixelFeatures)


@dataclass
class Extractor:
    """Features, and logits where the network has them, of uint8 images.

    Logits give the Inception score and, with one for each class of the data, label accuracy. A module's weights are hashed.

    Args:
        name: as results show it.
        network: called with uint8 images (B, C, H, W) on `device`; gives features (B, D), or a tuple of them alone or of
            features and logits (B, K).
        device: where it runs.
        needs_rgb: whether grey images are repeated to three channels for it.
        version: of the code that the features come from.
    """

    name: str
    network: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]
    device: torch.device
    needs_rgb: bool
    version: str

    def __post_init__(self) -> None:
        self.weights = fingerprints.of_module(self.network) if isinstance(self.network, torch.nn.Module) else None

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            images: (B, C, H, W), uint8.

        Returns:
            Features (B, D) and logits (B, K) or None, on the CPU.

        Raises:
            InputError: when the network's answer is not of these shapes.
        """
        images = images.to(self.device)
        if self.needs_rgb and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found = self.network(images)
        features, logits = (*found, None)[:2] if isinstance(found, tuple) else (found, None)
        for what, value in (("features", features), ("logits", logits)):
            if value is not None and (not torch.is_tensor(value) or value.ndim != 2 or len(value) != len(images)):
                shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
                raise InputError(
                    f"The extractor {self.name} gave {what} of shape {shape} for {len(images)} images; "
                    f"({len(images)}, D) is needed."
                )
        return features.cpu(), None if logits is None else logits.float().cpu()

    @property
    def identity(self) -> dict[str, str | None]:
        """What two sets of features must share to be compared."""
        return {"features": self.name, "weights": self.weights, "version": self.version}

    @property
    def distance_name(self) -> str:
        """`FID` for the field's standard features only: the name belongs to Inception."""
        return "FID" if self.name == INCEPTION else "Fréchet distance"


def load_extractor(name: str, weights: str | None, device: torch.device | str = "cpu") -> Extractor:
    """The feature extractor of that name.

    A custom one is given as `package.module:Class`, imported from the Python path or the present folder. `Class()`, or
    `Class(weights)` when `weights` is given, is the network of an `Extractor`; a `torch.nn.Module` is moved to the device.

    Args:
        name: one of `ALIASES`, a name of torch-fidelity's registry, or an import path with a colon.
        weights: a file with the extractor's weights; by default torch-fidelity's usual place.
        device: where it runs.

    Raises:
        InputError: for an unknown name, or weights that are not there or do not fit; says what to get and where to put it.
    """
    device = torch.device(device)
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"`feature_weights` {weights} is not a file.")
    if ":" in name:
        return _custom(name, weights, device)
    registered = ALIASES.get(name, name)
    if registered not in FEATURE_EXTRACTORS_REGISTRY:
        known = sorted({*ALIASES, *FEATURE_EXTRACTORS_REGISTRY} - {PIXELS})
        raise InputError(
            f"Unknown `features` {name!r}; choose one of: {', '.join(known)}, or give package.module:Class."
        )
    version = f"torch-fidelity {torch_fidelity.__version__}"
    network = _registered(registered, weights).to(device)
    return Extractor(name if registered == PIXELS else registered, network, device, registered != PIXELS, version)


def _registered(name: str, weights: str | None) -> torch.nn.Module:
    """The network of a name in torch-fidelity's registry."""
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layer, logits = (kind.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc"))
    # An embedding is no distribution over classes: only Inception has logits of its own.
    layers = [layer, logits] if logits != layer and "logits" in logits else [layer]
    if name == INCEPTION and weights is not None:
        _check_state_dict(weights)
    given = {} if weights is None else {"feature_extractor_weights_path": weights}
    try:
        return create_feature_extractor(name, layers, cuda=False, verbose=False, **given)
    except NotImplementedError:
        raise InputError(
            f"torch-fidelity takes no weights file for {name}: leave out `feature_weights` and put the files where "
            f"torch hub looks. {_where(name)}"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        source = f"the file {weights}" if weights else "its usual place"
        raise InputError(f"Cannot load the weights of {name} from {source}: {error}. {_where(name)}") from error


def _where(registered: str) -> str:
    """What to get for an extractor of torch-fidelity and where to put it."""
    hub = Path(torch.hub.get_dir())
    if registered.startswith("dinov2"):
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

        return (
            "On a machine with network access run `python -c \"import torch; torch.hub.load('facebookresearch/dinov2', "
            f"'{MODEL_METADATA[registered]}')\"` and copy its torch hub folder to {hub}."
        )
    if registered.startswith("clip"):
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        file = f"{registered}-{MODEL_METADATA[registered]['hash']}.pt"
        return (
            f"Get {MODEL_URLS[registered]} and save it as {hub / 'checkpoints' / file}, or give --feature_weights FILE."
        )
    if registered == INCEPTION:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

        return f"Get {url} and put it into {hub / 'checkpoints'}, or give --feature_weights FILE."
    return f"See torch-fidelity's documentation of {registered}; torch hub's folder is {hub}."


def _check_state_dict(path: str) -> None:
    """torch-fidelity unpickles the file without restrictions: only a plain state dict gets that far."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"`feature_weights` {path} is no plain file of tensors: {first}. {_where(INCEPTION)}"
        ) from error
    if not isinstance(state, dict) or "Conv2d_1a_3x3.conv.weight" not in state:
        raise InputError(f"`feature_weights` {path} does not hold the {INCEPTION} network. {_where(INCEPTION)}")


def _custom(name: str, weights: str | None, device: torch.device) -> Extractor:
    build = import_named("features", name)
    network = build(*([] if weights is None else [weights]))
    if isinstance(network, torch.nn.Module):
        network = network.to(device).eval().requires_grad_(False)
    version = getattr(sys.modules[name.partition(":")[0]], "__version__", "")
    return Extractor(name, network, device, needs_rgb=False, version=str(version))
