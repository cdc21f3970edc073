"""What the card of a text-to-image student says beyond that of other students: code that stock diffusers runs."""

import json
from pathlib import Path
from typing import Any

from ..text_to_image.student import ADAPTER, scheduler_class
from .card_tables import MISSING, Row
from .facts import ModelFacts
from .plain_text import code, escaped, is_repository, one_line, without_paths

#: A prompt for the code; what a card shows otherwise are pictures of its own.
PROMPT = "a red fox in the snow"
#: The tag under which the Hub shows the widget's pictures as a gallery.
GALLERY = "template:sd-lora"


def base_repository(facts: ModelFacts) -> str | None:
    """The base's Hub id, if the student was trained on a repository."""
    base = facts.texts["base"]
    return base if is_repository(base) and not Path(base).exists() else None


def text_tags(facts: ModelFacts) -> list[str | None]:
    """Tags for the Hub."""
    adapter = ["lora", GALLERY] if facts.texts["lora_rank"] is not None else []
    return ["text-to-image", *adapter]


def text_variables(facts: ModelFacts, shown: ModelFacts, source: str, base: str | None) -> dict[str, Any]:
    """The variables of `text_to_image.md`.

    Args:
        facts: of the folder.
        shown: the same, escaped for Markdown.
        source: what the code loads.
        base: where a published student's base is; None takes what the student was trained on.
    """
    record, adapter = facts.texts, facts.texts["lora_rank"] is not None
    kind, noise = scheduler_class(facts.folder), _draws_noise(facts)
    where = _literal(base or record["base"])
    if record["revision"] and base in (None, record["base"]):
        where += f", revision={_literal(record['revision'])}"
    size = {"height": record["height"], "width": record["width"]}
    calls = []
    for count in record["student_steps"]:
        given = {**record["arguments"][str(count)], **size}
        arguments = ", ".join(f"{name}={_literal(value)}" for name, value in given.items())
        calls.append((count, f"image = pipe(\n    prompt, {arguments}, generator=generator\n).images[0]"))
    return {
        "adapter": adapter,
        "adapter_name": ADAPTER,
        "pipeline_class": facts.pipeline_class,
        "scheduler_class": kind,
        "base": where,
        "calls": calls,
        "prompt": _literal(PROMPT),
        "global_noise": noise and facts.pipeline_class not in _PASSES_GENERATOR,
        "model": _rows(shown, record, adapter, noise),
    }


#: Pipelines that give a scheduler's steps the generator of a call.
_PASSES_GENERATOR = ("SanaPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")


def _draws_noise(facts: ModelFacts) -> bool:
    return bool(facts.scheduler.get("stochastic_sampling")) or facts.scheduler["_class_name"] == "LCMScheduler"


def _rows(shown: ModelFacts, record: dict[str, Any], adapter: bool, noise: bool) -> list[Row]:
    base = escaped(without_paths(record["base"]))
    values = MISSING if shown.parameters is None else f"{shown.parameters:,}"
    told = record["arguments"][str(record["student_steps"][-1])].get("guidance_scale", 1.0)
    rows = [
        ("Base", f"[{base}](https://huggingface.co/{base})" if base_repository(shown) else code(base)),
        ("Pipeline", f"{shown.pipeline_class} of diffusers"),
        ("Weights", f"LoRA of rank {record['lora_rank']}, {values} values" if adapter else f"full, {values} values"),
        ("Trained at", f"{record['height']} × {record['width']} pixels (height × width)"),
        ("Steps", " or ".join(map(str, record["student_steps"])) + ", one evaluation of the network each"),
        (
            "Guidance",
            f"told to the network: {told:g}" if shown.pipeline_class == "FluxPipeline" else "none: it is inside",
        ),
        ("From step to step", "fresh noise" if noise else "deterministic"),
        ("Scheduler", shown.scheduler["_class_name"]),
    ]
    if record["max_sequence_length"] is not None:
        rows.append(("Tokens of a prompt", f"at most {record['max_sequence_length']}"))
    return rows


def _literal(value: Any) -> str:
    """A Python literal in a line of code, whoever wrote the value."""
    return json.dumps(one_line(value), ensure_ascii=False) if isinstance(value, str) else repr(value)
