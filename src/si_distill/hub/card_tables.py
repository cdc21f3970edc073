"""The tables of a model card: facts as rows of text; missing facts are stated as such."""

import shlex
from html import unescape
from typing import Any

from ..objectives import get_objective
from .facts import ModelFacts
from .plain_text import code, is_repository, one_line, without_paths

MISSING = "not recorded"
Row = tuple[str, str]


def model_rows(facts: ModelFacts) -> list[Row]:
    """What the model is: network, sizes, classes, interpolant."""
    scheduler = facts.scheduler
    classes = facts.num_classes
    interpolant = _text(scheduler.get("interpolant"))
    if scheduler.get("interpolant_kwargs"):
        interpolant += f" ({_settings(scheduler['interpolant_kwargs'])})"
    rows = [
        ("Network", f"{facts.network_class}, {_number(facts.parameters)} values"),
        ("Works on", _space(facts)),
        ("Classes", "none (unconditional)" if classes == 0 else _text(classes)),
        ("Interpolant", interpolant),
        ("The network predicts", _text(scheduler.get("prediction_type"))),
        ("It is given the time as", _text(scheduler.get("timestep_type"))),
    ]
    if facts.takes_image:
        start = "the reference image" if facts.starts_from_image else "noise; the network sees a reference image"
        if facts.starts_from_image and facts.is_student:
            channels = scheduler.get("noise_channels")
            start += f", with {channels} channels of noise" if channels else "; a deterministic map"
        rows.append(("Starts from", start))
    if facts.is_student:
        rows += [
            ("Network evaluations", student_evaluations(facts)),
            ("Time of the first step", _text(scheduler.get("init_time"))),
        ]
        if scheduler.get("student_steps"):
            shift = scheduler.get("timestep_shift", 1)
            levels = f", levels shifted by {_number(shift)}" if shift != 1 else ""
            rows.append(("From step to step", _text(scheduler.get("solver")) + levels))
    else:
        rows.append(("Solver", _text(scheduler.get("solver"))))
    return rows


def student_evaluations(facts: ModelFacts) -> str:
    """How often a student's network is evaluated for an image."""
    steps = " or ".join(map(str, facts.trained_steps))
    if not facts.guidance:
        return f"{steps} per image, without guidance"
    channels = facts.guidance.get("channels")
    guided = f" of the first {channels} channels" if channels else ""
    guided_steps = " or ".join(str(2 * count) for count in facts.trained_steps)
    return f"{guided_steps} per image: guidance {_number(facts.guidance.get('scale'))}{guided} is inside the student"


def teacher_rows(facts: ModelFacts) -> list[Row]:
    """The teacher of a student."""
    recorded = facts.recorded.get("teacher") or {}
    name = recorded.get("name") or facts.settings.get("teacher")
    if recorded.get("source") == "hub" and is_repository(unescape(str(name))):
        revision = recorded.get("revision")
        where = f"[{name}](https://huggingface.co/{name}), revision {_text(revision)}"
    else:
        where = f"{code(name)}, a local folder" if name and recorded else _text(name)
    rows = [("Teacher", where)]
    rows.append(("Its network", _network(recorded.get("network"))))
    if facts.settings:
        scale = facts.settings.get("guidance_scale", 1.0)
        rows.append(("Guidance of the teacher", "none" if scale == 1 else f"{_number(scale)}, now inside the student"))
    return rows


def objective_rows(facts: ModelFacts) -> list[Row]:
    """The objective with all coefficients, the adversarial term, and the update ratio."""
    settings = facts.settings
    if "objective" not in settings:
        return [("Objective", MISSING)]
    name, kwargs = settings["objective"], settings.get("objective_kwargs") or {}
    rows = [("Objective", code(name) + (f" ({_settings(kwargs)})" if kwargs else ""))]
    try:
        objective = get_objective(name, **kwargs)
    except ValueError:
        rows.append(("Coefficients", f"{MISSING} (this version does not know the objective)"))
    else:
        # As the run resolved it: on some interpolants the trainer changes the space.
        space = facts.recorded.get("objective_space") or objective.space
        rows += [
            ("Critic (a, b, c)", _triple(objective.critic)),
            ("Generator (a, b, c)", _triple(objective.generator) + (", fields detached" if objective.detach else "")),
            ("Space and weights", f"{space}; generator {objective.weight}, critic {objective.critic_weight}"),
        ]
    adversarial = settings.get("adversarial") or {}
    kind = adversarial.get("kind", "none")
    rows.append(
        ("Adversarial term", "none" if kind == "none" else f"{kind} ({_settings(adversarial, skip=('kind',))})")
    )
    flow_map = settings.get("flow_map") or {}
    if flow_map.get("weight"):
        rows.append(("Flow-map term", _settings(flow_map)))
    if settings.get("student"):
        rows.append(("Started from the student", code(settings["student"])))
    critic, generator = settings.get("critic_steps", 1), settings.get("generator_steps", 1)
    order = [f"critic {critic}", f"generator {generator}"]
    order = order[::-1] if settings.get("generator_first") else order
    draws = settings.get("critic_draws")
    rows.append(("Updates per iteration", f"{', '.join(order)}" + (f", {draws} draws" if draws else "")))
    reductions = [settings.get(name) for name in ("loss_reduction", "critic_loss_reduction")]
    if reductions[0] is not None:
        of_critic = reductions[1] or reductions[0]
        scale = settings.get("loss_scale", 1.0)
        rows.append(("Losses over values", f"generator {reductions[0]} × {_number(scale)}, critic {of_critic}"))
    return rows


def training_rows(facts: ModelFacts) -> list[Row]:
    """Data, length, hardware, averages and versions of the training."""
    settings, sessions = facts.settings, facts.recorded.get("sessions") or []
    planned = settings.get("max_steps")
    steps = _text(None) if facts.steps is None else _number(facts.steps)
    if facts.steps is not None and planned and facts.steps < planned:
        steps += f" of {_number(planned)} planned"
    rows = [
        ("Data", _data(facts)),
        ("Iterations", steps),
        ("Images seen", _number(facts.images_seen)),
        ("Time in iterations", _duration(facts.seconds)),
        ("Hardware", _joined(session.get("hardware") for session in sessions)),
        ("Precision", _text(settings.get("mixed_precision"), {"no": "float32", "bf16": "bfloat16 autocast"})),
        ("Average of the weights (EMA)", _average(settings)),
        ("Learning rate", _learning_rate(settings)),
        ("Seed", _text(settings.get("seed"))),
        ("Versions", _joined(_settings(session.get("versions") or {}) or None for session in sessions)),
    ]
    if len(sessions) > 1:
        rows.append(("Resumed", f"{len(sessions) - 1} times"))
    return rows


def training_command(facts: ModelFacts) -> str | None:
    """How the run was launched, from what its first session noted."""
    sessions = facts.recorded.get("sessions") or []
    command = sessions[0].get("command") if sessions else None
    if not command:
        return None
    text = one_line(shlex.join(without_paths(command)))  # one line of a block of code
    if command[0] == "si-distill":
        return text
    return f"accelerate launch --num_processes {sessions[0].get('processes', 1)} {text}"


def _space(facts: ModelFacts) -> str:
    size, channels = facts.network.get("sample_size"), facts.network.get("in_channels")
    if size is None or channels is None:
        return MISSING
    if facts.vae is None:
        return f"pixels, {channels} × {size} × {size}"
    pixels = size * 2 ** (len(facts.vae.get("block_out_channels") or [0]) - 1)
    return f"latents, {channels} × {size} × {size}, of a {facts.vae.get('_class_name')}: {pixels} × {pixels} pixels"


def _data(facts: ModelFacts) -> str:
    data, recorded = facts.settings.get("data"), facts.recorded.get("data")
    if recorded:
        count = "a stream of" if recorded["images"] is None else _number(recorded["images"])
        return f"{recorded['name']}, split {recorded['split']}, {count} images"
    if facts.recorded:  # the run says that it read none
        return "no images: generated samples only"
    return f"{data['name']}, split {data.get('split')} (whether images were read is {MISSING})" if data else MISSING


def _average(settings: dict[str, Any]) -> str:
    if settings.get("ema_halflife_images") is not None:
        return f"half-life {_number(settings['ema_halflife_images'])} images"
    if settings.get("ema_decay") == 0:
        return "none: the weights themselves"
    return f"decay {settings['ema_decay']}" if settings.get("ema_decay") is not None else MISSING


def _learning_rate(settings: dict[str, Any]) -> str:
    if settings.get("learning_rate") is None:
        return MISSING
    text = f"{settings['learning_rate']:g}"
    if settings.get("critic_learning_rate") is not None:
        text += f", critic {settings['critic_learning_rate']:g}"
    return f"{text}, {settings.get('lr_scheduler_type')}; Adam ({settings.get('adam_beta1')}, {settings.get('adam_beta2')})"


def _network(recorded: dict[str, Any] | None) -> str:
    return f"{recorded['class']}, {_number(recorded['parameters'])} parameters" if recorded else MISSING


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _triple(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _settings(values: dict[str, Any], skip: tuple[str, ...] = ()) -> str:
    return ", ".join(
        f"{key} {_settings(value) if isinstance(value, dict) else _number(value)}"
        for key, value in values.items()
        if key not in skip and value is not None
    )


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text)) or MISSING


def _text(value: Any, names: dict[Any, str] | None = None) -> str:
    return MISSING if value is None else str((names or {}).get(value, value))


def _number(value: Any) -> str:
    """A value as people read it: thousands are grouped, floats have four digits."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
