"""`--dry_run`: what a run would build, need and write, from settings and shapes alone.

Networks are built on torch's meta device, which knows shapes and no numbers; nothing is loaded but configs, and nothing is
written.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...autoencoders import describe_vae
from ...data.latents.format import VAE_FOLDER, is_latent_cache, read_manifest
from ...errors import InputError
from ...loading import check_folder
from ...pipelines import OneStepInterpolantPipeline, view_network
from ...schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from ...text_to_image.network import TextNetwork
from ...text_to_image.student import TextToImageStudent
from ...units import binary_size
from ..build_network import CLASSES, FOREIGN_CLASSES
from ..config import TeacherConfig, TrainingConfig
from ..distillation.config import DistillConfig
from ..distillation.plan import plan_distillation
from ..distillation.start import StartingStudent
from ..optimizers import check_8bit_adam
from ..parallel.accelerator import check_installed
from ..run.folder import RunFolder
from ..run.measurement import check_measurement
from ..text_teacher import text_teacher_times
from .communication import Transfer, transfers
from .memory import (
    Devices,
    checkpoint_bytes,
    distillation_activations,
    parameter_count,
    teacher_activations,
    training_memory,
)
from .teacher import described_teacher, plan_on_meta
from .text import describe_texts, described_captioned, described_text_teacher

Lines = dict[str, str]


def dry_run(settings: TrainingConfig) -> str:
    """The report of a run of `settings`, as text.

    Raises:
        InputError: for everything in the settings that the run itself would refuse before it reads images or weights.
    """
    RunFolder(settings, writes=False).check()
    check_installed(settings.report_to)
    check_8bit_adam(settings, Devices.of_launcher().sharded)
    _check_files(settings)
    lines = _distillation(settings) if isinstance(settings, DistillConfig) else _teacher_training(settings)
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':<{width}} {text}" for name, text in lines.items())


def _check_files(settings: TrainingConfig) -> None:
    """Refuses files and folders that are not there, as the run would after it has loaded others."""
    resumed = settings.resume_from_checkpoint
    if resumed not in (None, "latest") and not Path(resumed).is_dir():
        raise InputError(f"{resumed} is not a whole checkpoint: no such folder.")
    if isinstance(settings, DistillConfig) and settings.student and Path(settings.student).is_dir():
        check_folder(OneStepInterpolantPipeline, "student", settings.student)


def print_dry_run(settings: TrainingConfig) -> None:
    """Prints the report, once per run."""
    text = dry_run(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{text}\nDry run: nothing was loaded, trained or written.", flush=True)


def _teacher_training(settings: TeacherConfig) -> Lines:
    check_measurement(settings, of_prompts=settings.is_text_to_image)
    if settings.is_text_to_image:
        return _captioned_training(settings)
    plan = plan_on_meta(settings)
    network = plan.network
    devices = Devices.of_launcher()
    activations, left_out = _activations(network, lambda: teacher_activations(network, settings, devices.sharded))
    cache = settings.data.name
    vae = describe_vae(f"{cache}/{VAE_FOLDER}")[0] if is_latent_cache(cache) else None
    parts = training_memory([network], None, network, settings, activations, devices, vae)
    return {
        "network": _network(network),
        "path": _path(plan.scheduler),
        **_batch(settings),
        "optimizer": _optimizer(vars(settings), network, settings.use_8bit_adam),
        "averages": _averages(settings),
        "data": _data(settings),
        **_memory(parts),
        **left_out,
        **_files(settings, parts, network),
    }


def _captioned_training(settings: TeacherConfig) -> Lines:
    teacher = described_captioned(settings)
    text_teacher_times(teacher, settings)
    base, devices = teacher.transformer, Devices.of_launcher()
    trained, frozen = (base, None) if settings.lora_rank is None else (copy.deepcopy(base), base)
    activations = teacher_activations(base, settings, devices.sharded)
    parts = training_memory([trained], frozen, trained, settings, activations, devices, teacher.vae)
    return {
        "network": _network(base),
        "path": _path(teacher.scheduler),
        **describe_texts(teacher, trained, settings),
        **_batch(settings),
        "optimizer": _optimizer(vars(settings), base, settings.use_8bit_adam),
        "averages": _averages(settings),
        "data": _data(settings, teacher.size),
        **_memory(parts),
        **_files(settings, parts, trained),
    }


def _distillation(settings: DistillConfig) -> Lines:
    text_teacher = described_text_teacher(settings)
    check_measurement(settings, of_prompts=text_teacher is not None)
    teacher, source = text_teacher or described_teacher(settings)
    plan = plan_distillation(settings, teacher, load=False)
    objective, critic, student = plan.objective, plan.critic, plan.student.network
    network = teacher.transformer.requires_grad_(False)
    if text_teacher:  # refuses steps that no stock call takes
        TextToImageStudent(teacher, student, plan.student.scheduler, settings.teacher, settings.text)
    devices = Devices.of_launcher()
    judged = plan.adversarial is not None
    activations, left_out = _activations(
        network, lambda: distillation_activations(network, objective, judged, settings, devices.sharded)
    )
    parts = training_memory([critic, student], network, student, settings, activations, devices, teacher.vae)
    view = teacher.network
    images = view.sample_shape[0] > 3 and not is_latent_cache(settings.data.name)
    latent = "; to be encoded first (`si-distill precompute-latents`)" if images else ""
    return {
        "teacher": f"{settings.teacher} ({source})",
        "network": _network(network),
        "path": _path(teacher.scheduler),
        "student": f"{_evaluations(settings)} "
        f"{_start(settings, plan.student)}, "
        + (f"from {settings.student} (not opened)" if settings.student else "from the teacher's weights"),
        "critic": {"teacher": "the teacher's weights", "random": "random weights"}.get(
            settings.critic_start, f"from the critic of {settings.critic_start} (not opened)"
        )
        + f"; {parameter_count([critic]):,} parameters",
        "objective": f"{objective.name}, critic {objective.critic}, generator {objective.generator}, {objective.space} "
        f"space, weight {objective.weight}, critic's weight {objective.critic_weight}",
        **_losses(settings),
        **_flow_map(settings, plan.student),
        **(describe_texts(teacher, student, settings) if text_teacher else {}),
        **_batch(settings),
        "updates": _updates(settings),
        "student's": _optimizer(
            {name: getattr(settings, name) for name in settings.of_critic()}, student, settings.use_8bit_adam
        ),
        "critic's": _optimizer(settings.of_critic(), critic, settings.use_8bit_adam),
        "averages": _averages(settings),
        "data": (_data(settings, teacher.size if text_teacher else None) + latent)
        if plan.needs_images
        else "no images: neither the objective nor an adversarial term uses any",
        **_memory(parts),
        **left_out,
        **_communication(transfers(parameter_count([student]), objective, settings, devices), devices),
        **_files(settings, parts, student),
    }


def _losses(settings: DistillConfig) -> Lines:
    """How the two losses are scaled, and the adversarial term's factors, if there is one."""
    reductions = {"student": settings.loss_reduction, "critic": settings.of_critic()["loss_reduction"]}
    scaled = ", ".join(f"{name}'s a {reduction} over values" for name, reduction in reductions.items())
    lines = {"losses": f"{scaled}; student's × {settings.loss_scale:g}"}
    term = settings.adversarial
    if term.kind == "none":
        return lines
    head = f", head {term.head} on the {term.features}'s features" if term.kind == "head" else ""
    times = "the losses' times" if term.t_min is None else f"times [{term.t_min:g}, {term.t_max:g}]"
    limits = {"logits": term.clamp, "critic's gradient": term.max_grad_value}
    cuts = [f"{what} to ±{limit:g}" for what, limit in limits.items() if limit is not None]
    return lines | {
        "adversarial": f"{term.kind}{head}, critic × {term.critic_weight:g}, student × {term.generator_weight:g} "
        f"({term.combine}), {times}, {'own' if term.own_noise else 'shared'} noise, real images "
        f"{'apart' if term.real_apart else 'alike'}{''.join(f', cut {cut}' for cut in cuts)}, from {term.start_images:,} "
        "images on"
    }


def _flow_map(settings: DistillConfig, student: StartingStudent) -> Lines:
    term = settings.flow_map
    if not term.weight:
        return {}
    start = f"t = {student.init_time:.4g}" + (" and noised images of the student" if term.starts == "both" else "")
    return {
        "flow map": f"× {term.weight:g} of the objective's gradient, {term.ratio:.4g} images for each of its own, from "
        f"{start}, residuals / (mean square)^{term.decay:g}, step {term.step_size:g}, teacher guided in "
        f"t = [{term.guidance_t_min:g}, {term.guidance_t_max:g}]"
    }


def _updates(settings: DistillConfig) -> str:
    order = [f"{settings.critic_steps} of the critic", f"{settings.generator_steps} of the student"]
    order = order[::-1] if settings.generator_first else order
    frozen = settings.generator_start_images
    total = settings.max_steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    total *= Devices.of_launcher().count
    never = f", which this run of {total:,} does not reach" if frozen >= total else ""
    waits = f"; the student is trained from image {frozen:,} on{never}" if frozen else ""
    return f"{', then '.join(order)} in an iteration, {settings.critic_draws} draws{waits}"


def _optimizer(values: dict[str, Any], network: nn.Module, in_8_bits: bool) -> str:
    """One network's optimizer, as a paper gives it, and its dropout."""
    decay = values["weight_decay"]
    name = (f"AdamW, weight decay {decay:g}" if decay else "Adam") + (", moments in 8 bits" if in_8_bits else "")
    dropout = max((module.p for module in network.modules() if isinstance(module, nn.Dropout)), default=0.0)
    return (
        f"{name}, rate {values['learning_rate']:g} after "
        f"{values['lr_warmup_steps']:,} updates, betas ({values['adam_beta1']:g}, {values['adam_beta2']:g}), epsilon "
        f"{values['adam_epsilon']:g}, gradient norm up to {values['max_grad_norm']:g}, dropout {dropout:g}"
    )


def _averages(settings: TrainingConfig) -> str:
    def described(value: float) -> str:
        if value >= 1:
            ramp = settings.ema_rampup_ratio
            return f"half-life {value:,.0f} images" + (f", ramped up by {ramp:g}" if ramp is not None else "")
        if value == 0:
            return "none (the weights themselves)"
        return f"decay {value:.8g}" + (", warmed up" if settings.ema_warmup else "")

    main = settings.ema_decay if settings.ema_halflife_images is None else settings.ema_halflife_images
    power = [f"power function of width {sigma_rel:g}" for sigma_rel in settings.ema_power_sigmas]
    return "; ".join([described(main), *map(described, settings.ema_extra), *power])


def _evaluations(settings: DistillConfig) -> str:
    """How often the student is evaluated for an image, and by which steps."""
    each = 1 if settings.student_guidance_scale == 1 else 2
    counts = " or ".join(str(each * count) for count in settings.student_steps)
    words = {"1": "one evaluation", "2": "two evaluations"}.get(counts, f"{counts} evaluations")
    return words if settings.student_steps == [1] else f"{words} ({settings.student_stepping} from level to level)"


def _start(settings: DistillConfig, student: StartingStudent) -> str:
    interpolant = student.scheduler.interpolant
    if settings.student_map == "negative_velocity":
        return f"of −v at t = {settings.init_time or 0.5:g} on plain noise"
    if not interpolant.gaussian_reference:
        return f"from the reference image, with {student.noise_channels} channels of noise"
    c = interpolant.coefficients(torch.tensor(student.init_time, dtype=torch.float64))
    return f"at t = {student.init_time:.4g} (β/α = {float(c.beta / c.alpha):.4g})"


def _activations(network: nn.Module, measure: Callable[[], int]) -> tuple[int, Lines]:
    """Bytes of activations; of a class from outside that does not run on the meta device none, and a line that says so."""
    try:
        return measure(), {}
    except Exception as error:
        if type(network) in (*CLASSES.values(), *FOREIGN_CLASSES.values(), TextNetwork):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(network).__name__
        return 0, {"left out": f"activations, for {name} does not run on torch's meta device: {reason}"}


def _network(network: nn.Module) -> str:
    view = view_network(network)
    size = " × ".join(map(str, view.sample_shape))
    if isinstance(network, TextNetwork):
        own = sum(p.numel() for name, p in network.base.named_parameters() if ".lora_" not in name)
        return f"{type(network.base).__name__}, {own:,} parameters, {size}, text"
    kind = f"{view.num_classes} classes" if view.num_classes else "unconditional"
    return f"{type(network).__name__}, {parameter_count([network]):,} parameters, {size}, {kind}"


def _path(scheduler: StochasticInterpolantScheduler) -> str:
    config = scheduler.config
    return f"{config.interpolant}, prediction {config.prediction_type}, timesteps {config.timestep_type}"


def _batch(settings: TrainingConfig) -> Lines:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    size, micro = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    images = size * micro * processes
    return {
        "batch": f"{size} per device × {micro} micro-batches × {processes} processes = {images:,} images per update",
        "run": f"{settings.max_steps:,} iterations × {images:,} = {settings.max_steps * images:,} images",
    }


def _data(settings: TrainingConfig, size: tuple[int, int] | None = None) -> str:
    """The data; `size` is the height and width of images with captions."""
    data = settings.data
    height, width = size or (data.image_size, data.image_size)
    if is_latent_cache(data.name):
        manifest = read_manifest(data.name)
        images = manifest.recipe.data
        return (
            f"{data.name}: {manifest.images:,} latents of {images['name']}, split {images['split']}, {height} × {width} "
            f"pixels, by {manifest.recipe.vae['name']}"
        )
    files = f" ({data.data_files})" if data.data_files else ""
    how = ", streamed" if data.streaming else ""
    limit = f", the first {data.max_train_samples:,}" if data.max_train_samples else ""
    references = f"; references: {data.describe_references()}" if data.has_references else ""
    return f"{data.name}{files}, split {data.split}, {height} × {width} pixels{how}{limit}{references}"


def _memory(parts: dict[str, int]) -> Lines:
    each = ", ".join(f"{name} {binary_size(size)}" for name, size in parts.items() if size)
    return {
        "memory": f"about {binary_size(sum(parts.values()))} per device, without libraries' workspaces",
        "of this": each,
    }


def _communication(found: list[Transfer], devices: Devices) -> Lines:
    if not found:
        return {}
    sent = sum(transfer.sent(devices.count) for transfer in found)
    kind = "FSDP2" if devices.sharded else "DDP"
    return {"communication": f"each device sends {binary_size(sent)} in an iteration, at one micro-batch ({kind})"}


def _files(settings: TrainingConfig, parts: dict[str, int], pipeline_network: nn.Module) -> Lines:
    checkpoint = checkpoint_bytes(parts, Devices.of_launcher())
    pipeline = parameter_count([pipeline_network]) * 4
    kept = min(settings.save_total_limit, -(-settings.max_steps // settings.save_steps))
    return {
        "writes": f"{settings.output_dir}/: config.yaml, metrics.jsonl every {settings.logging_steps:,} iterations, "
        f"samples/ every {settings.eval_steps:,}, checkpoints/ every {settings.save_steps:,} ({binary_size(checkpoint)} "
        f"each, {kept} kept and one more while saving), the pipeline ({binary_size(pipeline)})"
    }
