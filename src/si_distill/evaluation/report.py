"""Evaluation of students, teachers and finished images against real ones: a JSON file, a table, three pictures."""

import json
import time
from typing import Any

from ..errors import InputError
from ..files import delete, write_text
from ..launching import join_processes
from ..places import check_place
from ..text_to_image.student import is_text_student
from ..text_to_image.teacher import is_text_to_image
from .config import EvaluationConfig
from .judge import Judge
from .metrics import METRICS
from .prepared import Evaluation
from .shards import Shards, is_own, slug
from .table import format_table
from .text import TextEvaluation


def evaluate(settings: EvaluationConfig) -> dict[str, Any] | None:
    """Runs the evaluation and writes its files; every process of the launcher calls it.

    Returns:
        The contents of evaluation.json: how it was measured, and `rows`. None on all processes but the first.

    Raises:
        InputError: when a pipeline, the data or the features cannot be loaded, or they do not fit each other, or when
            another evaluation writes to the same output.
    """
    started = time.perf_counter()
    if not settings.has_prompts:
        _check_has_no_prompts(settings)
    kind = TextEvaluation if settings.has_prompts else Evaluation
    evaluation = kind(settings, join_processes())
    evaluation.claim()
    try:
        return _measure(evaluation, settings, started)
    finally:
        evaluation.lock.release()


def _measure(evaluation: Evaluation, settings: EvaluationConfig, started: float) -> dict[str, Any] | None:
    shards = evaluation.make_features()
    if not evaluation.state.is_main_process:
        return None  # what follows is quick next to the sampling, and needs no other process
    judge = Judge(settings, evaluation.reference, evaluation.class_names, evaluation.state.device, evaluation.prompts)
    rows = [judge.row(*row) for row in zip(evaluation.generators, (made.collect() for made in shards), strict=True)]
    features = evaluation.reference and evaluation.reference.features
    if features is not None and len(features) >= 4:  # a half of two has a variance
        rows.append(judge.floor())
    result = {
        **evaluation.how(),
        "intervals": f"95 %, bootstrap of generated images, {judge.resamples} resamples; recall: of real ones"
        + ("; figures of prompts: 1.96 standard errors" if evaluation.prompts else ""),
        "num_samples": evaluation.count,
        "classifier": evaluation.classifier.name if evaluation.classifier else None,
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    if settings.save_npz:
        for generator, made in zip(evaluation.generators, shards, strict=True):
            made.write_npz(evaluation.next_to(f"_{slug(generator.name)}.npz"))
    write_text(evaluation.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(evaluation.next_to(".md"), format_table(result) + "\n")
    evaluation.draw(result, judge.neighbours)
    _forget_others(shards)
    return result


def _check_has_no_prompts(settings: EvaluationConfig) -> None:
    """Refuses text-to-image pipelines, and metrics and settings of prompts, without prompts."""
    ways = "set `prompts_file` (a prompt in each line), or `data` with `data.caption_column`."
    for role, name in (("pipeline", settings.pipeline), ("teacher", settings.teacher)):
        if name:
            check_place(role, name)
        if name and (is_text_student(name) or is_text_to_image(name)):
            raise InputError(f"The {role} {name!r} makes images of prompts, and there are none: {ways}")
    for name in ("images_per_prompt", "height", "width", "dtype"):
        if getattr(settings, name) != getattr(EvaluationConfig, name):
            raise InputError(f"`{name}` is of images of prompts, and there are none: {ways} Or leave it out.")
    wanted = [m.asked_by for m in METRICS.values() if m.of_prompts and m.asked_by in settings.metrics]
    if wanted:
        raise InputError(f"`metrics` holds {wanted[0]}, which is of images of prompts, and there are none: {ways}")


def _forget_others(shards: list[Shards]) -> None:
    """Deletes features that no row of this result uses: those of weights that were since trained on, for instance."""
    used = {made.folder for made in shards}
    for folder in shards[0].folder.parent.iterdir():
        if folder not in used and is_own(folder):
            delete(folder)
