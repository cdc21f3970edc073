"""Checkpoints of EDM (Karras et al. 2022), EDM2 (Karras et al. 2024), and the students of SiD and SiDA (Zhou et al. 2024).

All are pickles of a preconditioning around a network: `EDMPrecond` around `SongUNet` (DDPM++, NCSN++) or `DhariwalUNet`
(ADM), `Precond` around `UNet` (EDM2). The preconditioning becomes the scheduler (`edm`, `log_sigma`), the network one of
ours with the same tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..errors import InputError
from ..models.unet_edm import EDMUNet2DModel
from ..models.unet_edm2 import EDM2_PRESETS, EDM2UNet2DModel
from ..schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from .checkpoints import check_tensors
from .config import ConvertConfig
from .converted import Converted
from .pickles import PickledObject, load_plain_pickle, reason_of
from .shown import printable, shown, some

#: Where the weights are: EDM, EDM2, SiD and SiDA write the average as `ema`; SiD's training states call it `G_ema`.
WEIGHTS = ("ema", "G_ema")
#: EDM's noise levels for sampling (Karras et al. 2022, table 1), narrowed to those that a network supports.
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
#: The noise level of a student's input (Zhou et al. 2024, SiD, section 4).
INIT_SIGMA = 2.5
#: EDM2's latents (Karras et al. 2024, appendix B.1): of images in [0, 1]; they have this mean and standard
#: deviation by channel, brought to mean 0 and standard deviation 0.5.
LATENTS_MEAN, LATENTS_STD, LATENTS_SCALE = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5

#: Height and width of the largest images: what a file declares is built before its tensors are looked at.
MAX_SIZE = 2048
#: Tensors of EDM2's log-variance: Fourier features and one linear layer.
LOG_VARIANCE_TENSORS = {
    "freqs": "logvar_fourier.freqs",
    "phases": "logvar_fourier.phases",
    "weight": "logvar_linear.weight",
}

# SiDA has versions of the classes that give features too; students alone are of these.
_TEACHERS = ("EDMPrecond", "Precond")
_STUDENTS = ("EDMPrecond_EncoderDecoder", "EDM_2_Precond_Generator")


def convert_edm(settings: ConvertConfig) -> Converted:
    """
    A pickled checkpoint as a teacher or a student in float32. Nothing in the file is executed.

    Args:
        settings: `source`, `kind` (`edm` for teachers, `sid` for one-step students, `auto` where the file tells), and
            `init_sigma` of a student.

    Raises:
        InputError: when the file cannot be read, is none of these networks, holds tensors that do not fit (their names and
            shapes are in the text), or `kind` or `init_sigma` do not fit it.
    """
    path = settings.source
    content = load_plain_pickle(path)
    preconditioning, place = _preconditioning(content, path)
    student = _is_student(content, preconditioning, settings)
    settings.check_kind("sid" if student else "edm")
    network, ignored = _network(preconditioning, path)
    log_variance = None if student else _log_variance(preconditioning)
    if log_variance:
        ignored = []
    state = preconditioning.state
    scheduler = StochasticInterpolantScheduler(
        interpolant="edm",
        interpolant_kwargs={
            "sigma_min": max(SIGMA_MIN, float(state.get("sigma_min", 0.0))),
            "sigma_max": min(SIGMA_MAX, float(state.get("sigma_max", SIGMA_MAX))),
            "rho": RHO,
            "sigma_data": float(state["sigma_data"]),
        },
        prediction_type="edm",
        timestep_type="log_sigma",
        solver="euler" if student else "edm_heun",
    )
    if student:
        sigma = INIT_SIGMA if settings.init_sigma is None else settings.init_sigma
        try:
            init_time = scheduler.interpolant.time_of_ratio(sigma)
        except ValueError as error:
            raise InputError(f"`init_sigma` is {sigma}, which is no noise level of this network: {error}") from None
        scheduler = type(scheduler).from_config(scheduler.config, init_time=init_time)
    vae_config = _latents(content, network)
    edm2 = isinstance(network, EDM2UNet2DModel)
    return Converted(
        kind=("SiD or SiDA" if student else "EDM2" if edm2 else "EDM"),
        place=place,
        preset=_preset(network),
        transformer=network.eval(),
        scheduler=scheduler,
        student=student,
        ignored=ignored,
        vae_config=vae_config,
        vae_pixel_min=0.0 if vae_config else -1.0,
        log_variance=log_variance,
    )


def _is_student(content: Any, preconditioning: PickledObject, settings: ConvertConfig) -> bool:
    """EDM and EDM2 write their training loss next to the weights; SiD writes nothing, and SiDA's classes are its own."""
    if preconditioning.class_name in _STUDENTS:
        if settings.kind == "edm":
            raise InputError(
                f"{settings.source} holds a {preconditioning.class_name}, a one-step student of SiDA: it is no teacher. "
                "Convert it with --kind sid."
            )
        return True
    if settings.kind == "auto" and not (isinstance(content, dict) and "loss_fn" in content):
        raise InputError(
            f"{settings.source} holds a network and nothing else, so that it may be a teacher or a one-step student of SiD: "
            "say which with --kind edm or --kind sid."
        )
    return settings.kind == "sid"


def _log_variance(preconditioning: PickledObject) -> dict[str, torch.Tensor] | None:
    """EDM2's u(σ), a part of its training loss that SiD's critic goes on with; None where the file has none."""
    tensors = preconditioning.tensors()
    found = {ours: tensors.get(theirs) for ours, theirs in LOG_VARIANCE_TENSORS.items()}
    if any(value is None for value in found.values()):
        return None
    return {name: value.float().clone() for name, value in found.items()}


def _preset(network: ModelMixin) -> str | None:
    config = network.config
    if isinstance(network, EDMUNet2DModel):
        return {"ddpmpp": "DDPM++", "ncsnpp": "NCSN++", "adm": "ADM"}[config.architecture]
    found = [name for name, channels in EDM2_PRESETS.items() if channels == config.model_channels]
    return found[0] if found and (list(config.channel_mult), config.num_blocks) == ([1, 2, 3, 4], 3) else None


def _preconditioning(content: Any, path: str) -> tuple[PickledObject, str]:
    """The preconditioned network in a file, and the name it has there."""
    keys = list(content) if isinstance(content, dict) else []
    place = next((key for key in WEIGHTS if key in keys), "")
    found = content[place] if place else content
    if not isinstance(found, PickledObject):
        what = f"a dictionary of {some(keys, 9)}" if keys else f"a {type(content).__name__}"
        raise InputError(f"{path} holds {what}, not a network under one of: {', '.join(WEIGHTS)}.")
    known = (*_TEACHERS, *_STUDENTS)
    if found.class_name not in known:
        raise InputError(
            f"{path} holds a {found.class_name}. Only networks in EDM's and EDM2's own preconditioning can be converted: "
            f"{', '.join(known)}."
        )
    if "sigma_data" not in found.state:
        raise InputError(f"The {found.class_name} in {path} lacks `sigma_data`.")
    return found, place


def _network(preconditioning: PickledObject, path: str) -> tuple[ModelMixin, list[str]]:
    """Our network with the tensors of the one in a preconditioning, in float32, and the names of those that it leaves."""
    tensors = preconditioning.tensors()
    modules = {name: module for name, module in preconditioning.state["_modules"].items() if name in ("model", "unet")}
    if len(modules) != 1:
        raise InputError(f"The {preconditioning.class_name} in {path} has no network `model` or `unet`.")
    ((prefix, module),) = modules.items()
    class_name = module.class_name.removesuffix("_EncoderDecoder")
    if class_name not in _CONFIGS:
        raise InputError(f"{path} holds a network {module.class_name}; known are {', '.join(_CONFIGS)}.")
    arguments = module.state.get("_init_kwargs")
    if not isinstance(arguments, dict) or module.state.get("_init_args"):
        raise InputError(f"The {module.class_name} in {path} does not say with which arguments it was built.")
    cls, read_config = _CONFIGS[class_name]
    try:
        config = read_config(_Arguments(arguments, f"The {module.class_name} in {path}"))
        if config["num_blocks"] * len(config["channel_mult"]) > len(tensors) or config["sample_size"] > MAX_SIZE:
            raise InputError(
                f"The {module.class_name} in {path} says that it has {config['num_blocks']} blocks on each of "
                f"{len(config['channel_mult'])} levels for images of {config['sample_size']} pixels, but the file has only "
                f"{len(tensors)} tensors, and more than {MAX_SIZE} pixels are not supported."
            )
        with torch.device("meta"):
            network = cls(**config)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InputError(
            f"The {module.class_name} in {path} cannot be built from {shown(arguments)}: {reason_of(error)}."
        ) from error
    # EDM2's log-variance is a weight of its training loss; no prediction needs it (see `_log_variance`).
    ignored = [name for name in tensors if name.startswith("logvar_")]
    state = {_our_name(name, prefix): value for name, value in tensors.items() if name not in ignored}
    shape = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    taken_for = f"{class_name} with " + ", ".join(f"{name}={network.config[name]}" for name in shape)
    check_tensors(state, {name: (name,) for name in network.state_dict()}, network, taken_for)
    network.load_state_dict({name: value.float().clone() for name, value in state.items()}, assign=True)
    return network, ignored


def _our_name(name: str, prefix: str) -> str:
    """Ours are the published names but for those of DDPM++'s and NCSN++'s last layers, which are called as in ADM."""
    name = name.removeprefix(f"{prefix}.")
    block, _, parameter = name.rpartition(".")
    for theirs, ours in (("_aux_norm", "out_norm"), ("_aux_conv", "out_conv")):
        if block.startswith("dec.") and block.endswith(theirs):
            return f"{ours}.{parameter}"
    return name


class _Arguments:
    """The arguments a published network was built with; each is taken once, and what is left must be the default.

    Args:
        values: the arguments.
        what: the network, for errors.
    """

    def __init__(self, values: Mapping[str, Any], what: str):
        self.values, self.what = dict(values), what

    def take(self, name: str, *default: Any) -> Any:
        value = self.values.pop(name, *default[:1]) if default or name in self.values else None
        if value is None:
            raise InputError(f"{self.what} does not say its {name!r}.")
        return value

    def close(self, **fixed: Any) -> None:
        """Refuses what our network does not have, unless it is as in the published networks."""
        for name, value in self.values.items():
            if name not in fixed or value != fixed[name]:
                known = f" instead of {fixed[name]!r}" if name in fixed else ""
                raise InputError(
                    f"{self.what} has {printable(name)} = {shown(value)}{known}, which this library's network does not have."
                )


def _song_config(arguments: _Arguments) -> dict[str, Any]:
    kind = (
        arguments.take("embedding_type", "positional"),
        arguments.take("encoder_type", "standard"),
        arguments.take("decoder_type", "standard"),
        arguments.take("channel_mult_noise", 1),
        tuple(arguments.take("resample_filter", [1, 1])),
    )
    kinds = {
        ("positional", "standard", "standard", 1, (1, 1)): "ddpmpp",
        ("fourier", "residual", "standard", 2, (1, 3, 3, 1)): "ncsnpp",
    }
    if kind not in kinds:
        raise InputError(
            f"{arguments.what} has the embedding, encoder, decoder, width of time features and filter {shown(kind)}: it "
            f"is neither DDPM++ nor NCSN++, which have {' or '.join(map(str, kinds))}."
        )
    return {"architecture": kinds[kind], **_edm_config(arguments, 128, [1, 2, 2, 2], 4, [16])}


def _adm_config(arguments: _Arguments) -> dict[str, Any]:
    return {"architecture": "adm", **_edm_config(arguments, 192, [1, 2, 3, 4], 3, [32, 16, 8])}


def _edm_config(arguments: _Arguments, model_channels: int, channel_mult: list[int], num_blocks: int, attn: list[int]):
    """What both kinds of EDM's networks have; the defaults are theirs."""
    config = {
        "sample_size": arguments.take("img_resolution"),
        "in_channels": arguments.take("in_channels"),
        "num_classes": arguments.take("label_dim", 0),
        "class_dropout_prob": float(arguments.take("label_dropout", 0)),
        "augment_dim": arguments.take("augment_dim", 0),
        "model_channels": arguments.take("model_channels", model_channels),
        "channel_mult": list(arguments.take("channel_mult", channel_mult)),
        "channel_mult_emb": arguments.take("channel_mult_emb", 4),
        "num_blocks": arguments.take("num_blocks", num_blocks),
        "attn_resolutions": list(arguments.take("attn_resolutions", attn)),
        "dropout": float(arguments.take("dropout", 0.1)),
    }
    arguments.close(out_channels=config["in_channels"])
    return config


def _edm2_config(arguments: _Arguments) -> dict[str, Any]:
    config = {
        "sample_size": arguments.take("img_resolution"),
        "in_channels": arguments.take("img_channels"),
        "num_classes": arguments.take("label_dim"),
        "model_channels": arguments.take("model_channels", 192),
        "channel_mult": list(arguments.take("channel_mult", [1, 2, 3, 4])),
        "num_blocks": arguments.take("num_blocks", 3),
        "attn_resolutions": list(arguments.take("attn_resolutions", [16, 8])),
        "attention_head_dim": arguments.take("channels_per_head", 64),
        "dropout": float(arguments.take("dropout", 0)),
    }
    # How SiDA trained, which the network does not show.
    for name in ("force_normalization", "use_gan"):
        arguments.values.pop(name, None)
    arguments.close(
        channel_mult_noise=None,
        channel_mult_emb=None,
        label_balance=0.5,
        concat_balance=0.5,
        res_balance=0.3,
        attn_balance=0.3,
        clip_act=256,
        resample_filter=[1, 1],
    )
    return config


_CONFIGS: dict[str, tuple[type[ModelMixin], Callable[[_Arguments], dict[str, Any]]]] = {
    "SongUNet": (EDMUNet2DModel, _song_config),
    "DhariwalUNet": (EDMUNet2DModel, _adm_config),
    "UNet": (EDM2UNet2DModel, _edm2_config),
}


def _latents(content: Any, network: ModelMixin) -> dict[str, Any]:
    """What an autoencoder's config has to say about EDM2's latents; nothing for a network on pixels.

    EDM2's files hold an object with `scale` = 0.5 / std and `bias` = −mean · scale; SiDA's do not, and use the same.
    """
    encoder = content.get("encoder") if isinstance(content, dict) else None
    mean, std = LATENTS_MEAN, LATENTS_STD
    if isinstance(encoder, PickledObject) and {"scale", "bias"} <= encoder.state.keys():
        scale, bias = (torch.as_tensor(encoder.state[name]).double().flatten() for name in ("scale", "bias"))
        mean, std = (-bias / scale).tolist(), (LATENTS_SCALE / scale).tolist()
    elif encoder is not None or not isinstance(network, EDM2UNet2DModel) or network.config.in_channels != len(mean):
        return {}
    if len(mean) != network.config.in_channels:
        raise InputError(f"The latents have {len(mean)} channels, but the network {network.config.in_channels}.")
    return {"latents_mean": list(mean), "latents_std": list(std), "scaling_factor": LATENTS_SCALE, "shift_factor": None}
