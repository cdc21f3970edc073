"""Folders that are ready for the Hub: made here, looked at with a dry run, uploaded by `publishing`."""

import filecmp
import json
import os
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import SpaceCardData
from PIL import Image

from ..errors import InputError
from ..evaluation.config import EVALUATION
from ..files import delete
from ..log_variance import LOG_VARIANCE
from ..reading import dump_yaml
from ..sampling import class_names, sample_rows, spread_labels
from ..visualization import image_grid
from .card import CARD, SAMPLES, is_own_text, pipeline_kind, render_card
from .facts import CONFIG, FACTS, METRICS, cached_blobs, read_facts
from .plain_text import is_repository, without_paths

VARIANTS = {"bf16": torch.bfloat16}
TEACHER_STEPS = 20
#: The app; in a clone a link to pipelines/space.
SPACE = Path(__file__).parent / "space"


def stage_model(
    pipeline: DiffusionPipeline,
    folder: Path,
    repo_id: str,
    run: Path | None = None,
    variant: str | None = None,
    license: str | None = None,
    teacher_repo_id: str | None = None,
) -> None:
    """
    Writes what a model's repository holds: the pipeline with its code, its card, pictures, and the run's results.

    Args:
        pipeline: a student or a teacher.
        folder: made anew.
        repo_id: where it will be published, for the card.
        run: the folder that the pipeline was loaded from. What the run and its evaluation left there is taken along if
            the weights are still those of the folder, and left behind if they have changed since.
        variant: a further copy of the weights: `"bf16"`.
        license: the Hub's identifier of a licence.
        teacher_repo_id: where the teacher is published.

    Raises:
        InputError: for another variant, a folder that is no pipeline of ours, or links that lead out of it or of `run`.
    """
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"`variant` is {variant!r}; choose one of: {', '.join(VARIANTS)}.")
    if teacher_repo_id is not None and not is_repository(teacher_repo_id):
        raise InputError(f"`teacher_repo_id` is {teacher_repo_id!r}, which is not the name of a repository: user/name.")
    if run is not None:
        check_links(run)
    make_anew(folder)
    pipeline.save_pretrained(folder)
    if variant:
        for name, component in pipeline.components.items():
            component = getattr(component, "_orig_mod", component)  # as it was before `torch.compile`
            if isinstance(component, torch.nn.Module):
                # Loaded, not cast: modules that their class keeps in float32 stay there.
                module = type(component).from_pretrained(folder / name, dtype=VARIANTS[variant])
                config = folder / name / component.config_name
                text = config.read_bytes()
                module.save_pretrained(folder / name, variant=variant)
                config.write_bytes(text)  # the second one names this folder
    facts = read_facts(folder, training=False)
    kind = pipeline_kind(facts)
    if not facts.takes_image:  # whose images could be shown, nobody here knows
        _sample_grid(pipeline, kind).save(folder / SAMPLES)
    own_text = None
    if run is not None and _same_weights(folder / "transformer", run / "transformer"):
        take_results(run, folder)
        own_text = (run / CARD).read_text(encoding="utf-8", errors="replace") if is_own_text(run) else None
        facts = read_facts(folder)
    variants = (variant,) if variant else ()
    card = render_card(facts, repo_id, license, teacher_repo_id, variants)
    (folder / CARD).write_text(own_text or str(card), encoding="utf-8")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that nobody else may read


def stage_space(
    folder: Path,
    repo_id: str,
    model_id: str,
    revision: str | None,
    teacher_id: str | None,
    private: bool = False,
    texts: bool = False,
) -> None:
    """
    Writes what a Gradio Space holds: the app, its settings, and the part of this package that samples.

    With the package next to the app, models load through its classes, and no code of a repository runs.

    Args:
        folder: made anew.
        repo_id: the Space.
        model_id, revision: the student and the commit to show.
        teacher_id: the teacher to compare with.
        private: whether the model is private, so that the Space needs a token of its own.
        texts: whether it is a text-to-image student, whose Space takes prompts.
    """
    make_anew(folder)
    rooms = ("models", "pipelines", "schedulers")
    if texts:
        rooms = (*rooms, "conversion", "text_to_image")
        for source, name in (
            ("text_app.py", "app.py"),
            ("text_README.md", CARD),
            ("text_students.py", "text_students.py"),
        ):
            shutil.copyfile(SPACE / source, folder / name)
        # Adapters, and the tokenizers of T5 and Gemma.
        requirements = (SPACE / "requirements.txt").read_text(encoding="utf-8")
        further = "peft>=0.18\nsentencepiece>=0.2\nprotobuf>=4\n"
        (folder / "requirements.txt").write_text(requirements + further, encoding="utf-8")
    else:
        shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__", "text_*"), dirs_exist_ok=True)
    package = Path(__file__).parents[1]
    for source in sorted(package.glob("*.py")):
        (folder / package.name).mkdir(exist_ok=True)
        shutil.copyfile(source, folder / package.name / source.name)
    for room in rooms:
        shutil.copytree(package / room, folder / package.name / room, ignore=shutil.ignore_patterns("__pycache__"))
    student = {"student": model_id, "revision": revision, "teacher": teacher_id}
    (folder / "space.json").write_text(json.dumps({"students": [student]}, indent=1) + "\n", encoding="utf-8")
    readme = (folder / CARD).read_text(encoding="utf-8")
    _, header, text = readme.split("---\n", 2)
    data = SpaceCardData(**yaml.safe_load(header))
    data.title = repo_id.split("/")[-1]
    data.models = [model_id, *([teacher_id] if teacher_id else [])]
    note = (
        "\nThe model is private: add a secret `HF_TOKEN` that may read it to the Space's settings.\n" if private else ""
    )
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n{text}{note}", encoding="utf-8")


def listing(folder: Path) -> list[tuple[str, int]]:
    """The files of a staged folder, by their names in the repository, with sizes in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def _sample_grid(pipeline: DiffusionPipeline, kind: str) -> Image.Image:
    """A picture of some classes: four rows of a student, one of a teacher, which is slower."""
    labels = spread_labels(pipeline.network.num_classes) or None
    kwargs = {"columns": 10, "batch_size": 16} | ({} if kind == "student" else {"num_inference_steps": TEACHER_STEPS})
    try:
        rows = sample_rows(pipeline, labels, 4 if kind == "student" else 1, 0, **kwargs)
    except ValueError as error:  # of the pipeline's own checks, e.g. of latents without an autoencoder
        raise InputError(f"The pipeline's images for the card cannot be made: {error}") from error
    return image_grid(rows, column_titles=labels and class_names(pipeline, labels))


def check_links(run: Path) -> None:
    """
    Refuses links in a folder that lead out of it, other than to `cached_blobs`: what they lead to would be published.

    Raises:
        InputError: names the link.
    """
    components = [path for path in run.iterdir() if (path / "config.json").exists() or path.name == "scheduler"]
    for path in [*run.iterdir(), *(file for folder in components for file in folder.rglob("*"))]:
        check_link(path, run)


def check_link(path: Path, run: Path) -> None:
    """Refuses one path of the folder `run` if it is such a link."""
    places = [run.resolve(), *filter(None, [cached_blobs(run)])]
    if path.is_symlink() and not any(map(path.resolve().is_relative_to, places)):
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, outside of {run}, and is not published: put a copy in its place, or "
            "remove the link."
        )


def make_anew(folder: Path) -> None:
    """Deletes what an earlier publication left in a folder, which is `hub/model` or `hub/space` of a run.

    Raises:
        InputError: when it is reached by a link: what is there is not ours to delete.
    """
    for path in (folder, folder.parent):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {os.readlink(path)}: nothing is written or deleted behind a link. Remove the link."
            )
    delete(folder)
    folder.mkdir(parents=True)


def take_results(run: Path, folder: Path) -> None:
    """Writes anew what describes the run, without the paths of this machine. The evaluation's pictures stay: they show
    images of the data set, whose licence nobody here knows.
    """
    facts = read_facts(run)
    if (run / LOG_VARIANCE).is_file():
        shutil.copyfile(run / LOG_VARIANCE, folder / LOG_VARIANCE)
    if facts.metrics:
        lines = [json.dumps(without_paths(line), ensure_ascii=False) for line in facts.metrics]
        (folder / METRICS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, values in ((FACTS, facts.recorded), (EVALUATION, facts.evaluation)):
        if (run / name).is_file():
            text = json.dumps(without_paths(values), indent=1, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    if facts.settings:
        settings = without_paths(facts.settings)
        for name in ("resume_from_checkpoint", "overwrite_output_dir", "push_to_hub", "hub_model_id"):
            settings.pop(name, None)  # of one launch, not of the training
        (folder / CONFIG).write_text(dump_yaml(settings), encoding="utf-8")


def _same_weights(staged: Path, original: Path) -> bool:
    files = [path for path in staged.glob("*.safetensors") if path.name.count(".") == 1]
    return bool(files) and all(
        (original / file.name).is_file() and filecmp.cmp(file, original / file.name, shallow=False) for file in files
    )
