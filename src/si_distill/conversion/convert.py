"""`training/convert_teacher.py`: any checkpoint that the library knows, as a pipeline folder of its own form."""

from pathlib import Path

from ..errors import InputError
from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline, view_network
from .checkpoints import choose_weights, read_checkpoint
from .config import ConvertConfig
from .converted import Converted
from .diffusers_teachers import convert_diffusers, saved_class
from .edm import convert_edm
from .output import check_output, fitting_vae, load_id2label, write_pipeline
from .pickles import reason_of
from .shown import some
from .sit import convert_sit, is_sit
from .torchcfm import convert_torchcfm, is_torchcfm

#: Endings of checkpoint files; what has another one and is no file is a folder or Hub id of diffusers.
FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".pkl")


def convert_checkpoint(settings: ConvertConfig) -> None:
    """Converts, writes and describes what it did.

    Raises:
        InputError: for a checkpoint that cannot be converted, settings that contradict it, or a folder that may not be
            written. Nothing is written then.
    """
    folder = Path(settings.out).absolute()
    check_output(folder, settings.overwrite)
    converted = _convert(settings)
    if settings.vae is not None:
        converted.vae = fitting_vae(settings.vae, converted.transformer)
    if settings.id2label is not None:
        converted.id2label = load_id2label(settings.id2label, view_network(converted.transformer).num_classes)
    rms = write_pipeline(converted, folder)
    print(describe(converted, folder, rms))


def _convert(settings: ConvertConfig) -> Converted:
    if settings.kind == "diffusers" or (settings.kind == "auto" and not _is_file(settings.source)):
        return _convert_diffusers(settings)
    try:
        return _convert_file(settings)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(
            f"{settings.source} has the form of a checkpoint, but holds something else where its values should be: "
            f"{reason_of(error)}."
        ) from error


def _convert_file(settings: ConvertConfig) -> Converted:
    if settings.kind in ("edm", "sid") or (settings.kind == "auto" and settings.source.endswith(".pkl")):
        return convert_edm(settings)
    content = read_checkpoint(Path(settings.source))
    _, weights = choose_weights(content, settings.which, settings.ema_decay)
    kind = settings.kind
    if kind == "auto":
        kind = "sit" if is_sit(weights) else "torchcfm" if is_torchcfm(weights) else "auto"
    if kind == "auto":
        raise InputError(
            f"{settings.source} is of no known kind: its tensors are named {some(weights, 3)}. Known are SiT "
            "and REPA (x_embedder.proj.weight, …), torchcfm and RealUID (input_blocks.0.0.weight, …), and "
            ".pkl files of EDM, EDM2, SiD and SiDA."
        )
    settings.check_kind(kind)
    return convert_sit(content, settings) if kind in ("sit", "repa") else convert_torchcfm(content, settings)


def _is_file(source: str) -> bool:
    """Whether it is meant as a file, there or not, rather than as a folder or Hub id."""
    return Path(source).is_file() or Path(source).suffix in FILES


def _convert_diffusers(settings: ConvertConfig) -> Converted:
    name = saved_class(settings.source)
    if name in (InterpolantPipeline.__name__, OneStepInterpolantPipeline.__name__):
        raise InputError(f"{settings.source} is a pipeline folder of this library already: use it as it is.")
    settings.check_kind("diffusers")
    pipeline = convert_diffusers(settings.source)
    return Converted(
        kind=f"diffusers' {name}",
        transformer=pipeline.transformer,
        scheduler=pipeline.scheduler,
        vae=pipeline.vae,
        id2label=pipeline.config.id2label,
    )


def describe(converted: Converted, folder: Path, rms: float) -> str:
    """What was found and done, for a person."""
    network, scheduler = view_network(converted.transformer), converted.scheduler
    channels, height, width = network.sample_shape
    parameters = sum(parameter.numel() for parameter in network.bare.parameters())
    classes = f"{network.num_classes} classes" if network.num_classes else "unconditional"
    null = " and a null class for guidance" if network.null_class is not None else ""
    vae = type(converted.vae).__name__ if converted.vae else "none: the network's images are pixels in [-1, 1]"
    if converted.vae is None and channels > 3:
        name = "sd-vae-ft-mse" if converted.vae_config else "sd-vae-ft-ema"
        vae = f"none, but the network works on latents: add --vae, e.g. stabilityai/{name}, to decode them"
    ignored = sorted({name.split(".")[0] for name in converted.ignored})
    lines = {
        "found": converted.kind
        + (" student" if converted.student else " teacher")
        + (f", weights {converted.place!r}" if converted.place else ""),
        "network": " ".join(filter(None, (type(network.bare).__name__, converted.preset)))
        + f", {parameters:,} parameters",
        "images": f"{channels} × {height} × {width}, {classes}{null}",
        "path": f"{scheduler.config.interpolant}, prediction {scheduler.config.prediction_type}",
        "time": "data at t = 1, as the network was trained" if scheduler.config.reversed_time else "",
        "ignored": f"{len(converted.ignored)} tensors: {some(ignored)}" if ignored else "nothing",
        "kept": "the log-variance, for critics with critic_log_variance" if converted.log_variance else "",
        "vae": vae,
        "check": f"saved and loaded alike; x̂0 of noise has RMS {rms:.3f} (0.3 to 1.2 for a trained network)",
        "written": str(folder),
    }
    return "\n".join(f"{name + ':':<9} {text}" for name, text in lines.items() if text)
