"""Settings of `training/convert_teacher.py`."""

from dataclasses import dataclass

from ..errors import InputError
from ..settings import at_least, setting

KINDS = ("auto", "sit", "repa", "torchcfm", "realuid", "diffusers", "edm", "sid")

#: Settings that only some kinds have a use for.
_SPECIFIC = {
    "which": ("sit", "repa", "torchcfm", "realuid"),
    "ema_decay": ("torchcfm", "realuid"),
    "interpolant": ("sit", "repa", "torchcfm", "realuid"),
    "prediction_type": ("sit", "repa"),
    "preset": ("sit", "repa"),
    "num_classes": ("sit", "repa"),
    "sample_size": ("sit", "repa", "torchcfm", "realuid"),
    "num_attention_heads": ("sit", "repa", "torchcfm", "realuid"),
    "init_sigma": ("sid",),
}


@dataclass
class ConvertConfig:
    source: str = setting("", "The checkpoint: a file, a folder or a Hub id.")
    out: str = setting("", "The pipeline folder to write.")
    overwrite: bool = setting(False, "Replace `out` if it is not empty.")
    kind: str = setting("auto", "What the checkpoint is; `auto` recognises it from its content.", KINDS)
    vae: str | None = setting(None, "Folder or Hub id of the autoencoder of a latent network; it is copied into `out`.")
    id2label: str | None = setting(None, "Names of the classes: imagenet, or a JSON or YAML file of number: name.")
    which: str | None = setting(
        None,
        "Which weights of a training checkpoint: ema, model, ema_model, net_model, ema_models, gen or ema_gens; of "
        "Lightning's `state_dict`, the part below that name.",
    )
    ema_decay: str | None = setting(None, "Which of several averages in ema_models or ema_gens, e.g. 0.9999.")
    preset: str | None = setting(None, "SiT and REPA: the size that the tensors must have, e.g. SiT-XL/2.")
    interpolant: str | None = setting(
        None, "SiT, REPA, torchcfm: the path, if the checkpoint does not say.", ("linear", "trigonometric", "vp")
    )
    prediction_type: str | None = setting(
        None, "SiT: what it predicts, if the checkpoint does not say.", ("velocity", "score", "epsilon")
    )
    num_classes: int | None = setting(None, "SiT and REPA: classes without the null class; all but one when not given.")
    sample_size: int | None = setting(
        None, "Height and width of the (latent) image; needed where it does not follow from the tensors."
    )
    num_attention_heads: int | None = setting(
        None, "Heads of an attention layer; needed for a network that is of none of the published sizes."
    )
    init_sigma: float | None = setting(
        None, "SiD and SiDA: the noise level of the student's input; 2.5 when not given."
    )

    def __post_init__(self) -> None:
        if not self.source or not self.out:
            raise InputError("Give --source CHECKPOINT and --out FOLDER.")
        for name in ("num_classes", "sample_size", "num_attention_heads"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)

    def check_kind(self, kind: str) -> None:
        """Refuses settings that a checkpoint of that kind has no use for."""
        for name, kinds in _SPECIFIC.items():
            if getattr(self, name) is not None and kind not in kinds:
                raise InputError(
                    f"`{name}` is {getattr(self, name)!r}, but the checkpoint is of kind {kind}, which has no such choice. "
                    "Leave it out."
                )
