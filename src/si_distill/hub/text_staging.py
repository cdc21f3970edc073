"""The repository of a text-to-image student: its LoRA or its pipeline, its card with pictures, and the run's results."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..files import write_text
from ..reading import read_json
from ..text_to_image.lora import LORA_WEIGHTS
from ..text_to_image.student import ADAPTER, STUDENT, LoadedStudent, load_student, read_student
from ..visualization import image_grid
from .card import CARD, SAMPLES, is_own_text, render_card
from .facts import read_facts
from .staging import check_link, check_links, make_anew, take_results
from .text_card import PROMPT, base_repository

#: Of the pictures on the card.
PROMPTS = (
    *(PROMPT, "a lighthouse on a cliff at sunset, oil painting"),
    *("a bowl of ramen on a wooden table, photograph", "an astronaut reading a book in a library"),
)
PICTURES = "images"


def stage_text_student(
    run: Path,
    folder: Path,
    repo_id: str,
    merged: bool = False,
    license: str | None = None,
    base_repo_id: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Writes what the repository of a student holds.

    Args:
        run: the folder of the student, a run's or another.
        folder: made anew.
        repo_id: where it will be published, for the card.
        merged: whether a LoRA becomes a part of the weights and the whole pipeline is written.
        license: the Hub's identifier of a licence.
        base_repo_id: where the base is published, when the run loaded it from a folder.
        prompts: of the pictures on the card.
        base: where the base is on this machine, when it has moved.
        dtype: precision in which pictures are made and a LoRA is merged; float32 when not given.

    Raises:
        InputError: for a LoRA whose base nobody else has, full weights that are to be merged, or what cannot be loaded.
    """
    check_links(run)
    facts, record = read_facts(run), read_student(run)
    adapter = record["lora_rank"] is not None
    published_base = base_repo_id or base_repository(facts)
    if merged and not adapter:
        raise InputError(f"{run} holds full weights, with nothing to merge: leave out --merged.")
    if adapter and not merged and published_base is None:
        raise InputError(
            f"{run} is a LoRA for {record['base']!r}, a folder that nobody else has: publish that and give its name with "
            "--teacher_repo_id, or publish the whole pipeline with --merged."
        )
    student = load_student(run, dtype, base)
    student.pipeline.set_progress_bar_config(disable=True)
    student.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = [
        image
        for prompt, generator in zip(prompts, generators, strict=True)
        for image in student.images([prompt], generators=[generator])
    ]
    make_anew(folder)
    if merged:
        merge(student).save_pretrained(folder)
    else:
        _copy(run, folder, adapter)
    base_name = published_base or Path(record["base"]).name  # publications tell no home folders
    revision = record["revision"] if base_name == record["base"] else None
    record = record | {"base": base_name, "revision": revision, "lora_rank": None if merged else record["lora_rank"]}
    write_text(folder / STUDENT, json.dumps(record, indent=1) + "\n")
    take_results(run, folder)
    pictures = {f"{PICTURES}/{number}.png": prompt for number, prompt in enumerate(prompts)}
    (folder / PICTURES).mkdir()
    for name, image in zip(pictures, images, strict=True):
        image.save(folder / name)
    image_grid([images], column_titles=prompts).save(folder / SAMPLES)
    own_text = (run / CARD).read_text(encoding="utf-8", errors="replace") if is_own_text(run) else None
    card = render_card(read_facts(folder), repo_id, license, published_base, pictures=pictures)
    (folder / CARD).write_text(own_text or str(card), encoding="utf-8")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that nobody else may read


def merge(student: LoadedStudent):
    """The student's pipeline with the LoRA in the weights of its network, which stays so."""
    student.pipeline.fuse_lora(adapter_names=[ADAPTER])
    student.pipeline.unload_lora_weights()
    return student.pipeline


def _copy(run: Path, folder: Path, adapter: bool) -> None:
    """The files of the student alone: a run's folder holds much else."""
    if adapter:
        names = [LORA_WEIGHTS, "scheduler"]
    else:
        index = read_json(run / "model_index.json")
        names = ["model_index.json", *(name for name, value in index.items() if isinstance(value, list) and any(value))]
    for name in names:
        files = [run / name] if (run / name).is_file() else [path for path in (run / name).rglob("*") if path.is_file()]
        for file in files:
            if file.suffix in (".py", ".bin", ".pt", ".pkl", ".ckpt"):
                continue  # stock pipelines need no code, and safetensors are the only weights
            check_link(file, run)
            target = folder / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
