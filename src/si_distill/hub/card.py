"""The model card: `model_cards/` templates filled with what is known of a model (see `facts`)."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import InputError
from ..evaluation.config import EVALUATION
from ..evaluation.metrics import METRICS
from ..evaluation.table import format_table
from ..files import write_text
from .card_tables import MISSING, model_rows, objective_rows, teacher_rows, training_command, training_rows
from .facts import CONFIG, FACTS, STUDENT, TEACHER, ModelFacts, cached_blobs, read_facts
from .facts import METRICS as LOG
from .plain_text import escaped, is_repository, is_word, one_line, without_paths
from .text_card import GALLERY, base_repository, text_tags, text_variables

TEMPLATES = Path(__file__).parent / "model_cards"
CARD, SAMPLES = "README.md", "samples.png"
#: The line by which a card is known to be ours to replace; its owner takes it out to keep a text of their own.
GENERATED = "<!-- Made by si_distill from the files of this folder. Remove this line to keep a text of your own. -->"

#: What a card shows of a folder's files, whoever wrote them.
_FOREIGN = (
    "id2label",
    "network_class",
    "network",
    "scheduler",
    "vae",
    "guidance",
    "settings",
    "metrics",
    "recorded",
    "evaluation",
)


def write_card(folder: str | Path) -> None:
    """
    Writes README.md of a pipeline or run folder, unless a text of the owner's is there.

    Raises:
        InputError: when the folder is no pipeline of ours or one of its files is damaged.
        OSError: when it cannot be written.
    """
    folder = Path(folder)
    if is_own_text(folder) or (folder / CARD).is_symlink():  # a link is of the owner's making too
        return
    write_text(folder / CARD, str(render_card(read_facts(folder))))


def is_own_text(folder: Path) -> bool:
    """Whether the folder's README.md was written, or taken over, by its owner; what a link leads to was not, but for the
    Hub's cache of links.
    """
    path = folder / CARD
    if not path.is_file() or (path.is_symlink() and cached_blobs(folder) is None):
        return False
    return GENERATED not in path.read_text(encoding="utf-8", errors="replace")


def render_card(
    facts: ModelFacts,
    repo_id: str | None = None,
    license: str | None = None,
    teacher_repo_id: str | None = None,
    variants: tuple[str, ...] = (),
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """
    The card of a student or a teacher.

    Args:
        facts: of its folder.
        repo_id: the repository that the folder goes to; the card of a local folder names the folder.
        license: the Hub's identifier of a licence; without one the card says that none was given.
        teacher_repo_id: where the teacher is published, when the run loaded it from a folder.
        variants: of the weights, e.g. `("bf16",)`.
        pictures: of a text-to-image student: files in the folder and the prompts that they show.

    Raises:
        InputError: when the folder's files hold something else than a run and its evaluation write.
    """
    try:
        return _render(facts, repo_id, license, teacher_repo_id, variants, pictures or {})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{facts.folder} cannot be described: one of its {CONFIG}, {FACTS}, {LOG} and {EVALUATION} was written by "
            f"another version, or changed ({type(error).__name__}: {error}). Restore it, or remove it."
        ) from error


def _render(
    facts: ModelFacts,
    repo_id: str | None,
    license: str | None,
    teacher_repo_id: str | None,
    variants: tuple[str, ...],
    pictures: dict[str, str],
) -> ModelCard:
    teacher = teacher_repo_id or facts.teacher_repository or (base_repository(facts) if facts.texts else None)
    name = (repo_id or facts.folder.resolve().name).split("/")[-1]
    source = repo_id or _local_source(facts)
    picture = _picture(facts.folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,  # a fact that nobody passed is an error, not a blank
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    kind = "text_to_image" if facts.texts else "student" if facts.is_student else "teacher"
    template = environment.get_template(f"{kind}.md")
    data = card_data(facts, name, license, teacher, pictures)
    # What others wrote is text in the card, and never a part of its Markdown; in blocks of code it stays as it is.
    shown = replace(facts, **{name: escaped(without_paths(getattr(facts, name))) for name in _FOREIGN})
    if facts.texts:
        variables = text_variables(facts, shown, source, teacher if repo_id else None)
    else:
        variables = dict(
            pipeline_class=facts.pipeline_class,
            call=_call_arguments(facts),
            takes_image=facts.takes_image,
            variants=variants,
            classes=facts.num_classes,
            guided=facts.num_classes and facts.network.get("class_dropout_prob", 1) > 0,
            model=model_rows(shown),
        )
    text = template.render(
        card_data=data.to_yaml(),
        generated=GENERATED,
        missing=MISSING,
        name=escaped(name),
        source=source,
        on_hub=repo_id is not None,
        picture=picture,
        teacher=teacher,
        evaluations=_evaluations(facts),
        several_steps=facts.trained_steps if facts.trained_steps != [1] else None,
        teacher_table=teacher_rows(shown),
        objective=objective_rows(shown),
        training=training_rows(shown),
        command=training_command(facts),
        has_config=bool(facts.settings),
        config=CONFIG,
        command_module="train_distill" if facts.is_student else "train_teacher",
        results=_results(shown),
        license=license,
        references=_references(facts),
        **variables,
    )
    return ModelCard(text)


def card_data(
    facts: ModelFacts,
    name: str,
    license: str | None = None,
    teacher_repo_id: str | None = None,
    pictures: dict[str, str] | None = None,
) -> ModelCardData:
    """The metadata at the top of the card, in huggingface_hub's own classes, which check them."""
    conditional = facts.num_classes != 0
    tags = ["stochastic-interpolant", facts.scheduler.get("interpolant")]
    tags.append(None if facts.takes_image else "image-generation")
    tags.append("class-conditional-image-generation" if conditional else None)
    tags = text_tags(facts) if facts.texts else tags
    steps = "one-step" if facts.trained_steps == [1] else "few-step"
    tags += [steps, "distillation", facts.settings.get("objective")] if facts.is_student else ["teacher"]
    dataset, results = _dataset(facts), eval_results(facts)
    further: dict[str, Any] = {}
    if facts.texts and teacher_repo_id:
        further["base_model_relation"] = "finetune" if facts.texts["lora_rank"] is None else "adapter"
    if pictures:
        further["widget"] = [{"text": prompt, "output": {"url": file}} for file, prompt in pictures.items()]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=_task(facts),
        license=license,
        base_model=teacher_repo_id,
        datasets=[dataset] if dataset else None,
        tags=[tag for tag in tags if is_word(tag) or tag == GALLERY],
        model_name=name if results else None,
        eval_results=results or None,
        **further,
    )


def _task(facts: ModelFacts) -> str:
    """The Hub's name for what the model does; it has none for generation by class."""
    if facts.texts:
        return "text-to-image"
    return "image-to-image" if facts.takes_image else "unconditional-image-generation"


def eval_results(facts: ModelFacts) -> list[EvalResult]:
    """The rows of evaluation.json that are of this model, as entries of the Hub's model index."""
    evaluation = without_paths(one_line(facts.evaluation or {}))
    reference = evaluation.get("reference") or {}
    how = {name: evaluation.get(name) for name in ("evaluator", "features", "num_samples", "class_balance", "seed")}
    how |= {"reference_images": reference.get("images")}
    results = []
    for row in evaluation.get("rows") or ():
        if (row.get("made") or {}).get("kind") != ("student" if facts.is_student else "teacher"):
            continue
        for figure, metric in METRICS.items():
            if metric.hub is None or row.get(figure) is None:
                continue
            is_fid = metric.hub == "frechet-distance" and evaluation.get("distance") == "FID"  # on Inception's features
            arguments = {**how, "interval": (row.get("intervals") or {}).get(figure)}
            results.append(
                EvalResult(
                    task_type=_task(facts),
                    task_name=_task(facts).replace("unconditional-", "").replace("-", " "),
                    dataset_type=_dataset(facts) or str(reference.get("name")),
                    dataset_name=str(reference.get("name")),
                    dataset_split=reference.get("split"),
                    metric_type="fid" if is_fid else metric.hub,
                    metric_name=f"{figure} ({row['generator']})",
                    metric_value=row[figure],
                    metric_args={name: value for name, value in arguments.items() if value is not None},
                )
            )
    return results


def _dataset(facts: ModelFacts) -> str | None:
    """The training images' repository on the Hub, if they are from there."""
    data = facts.recorded.get("data") or {}
    return data["name"] if data.get("source") == "hub" and is_repository(data["name"]) else None


def _results(facts: ModelFacts) -> str | None:
    """The table of the evaluation with how it was measured, or None without one."""
    if not facts.evaluation:
        return None
    try:
        return format_table(facts.evaluation)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{facts.folder / EVALUATION} was written by another version (it lacks {error}): evaluate again, or remove it."
        ) from error


def _local_source(facts: ModelFacts) -> str:
    """How this machine's owner calls the folder: the setting, unless it is a path of this machine alone."""
    output = str(facts.settings.get("output_dir") or "")
    known = re.fullmatch(r"\w[\w./ -]*", output)  # it goes into lines of code
    return output if known else re.sub(r"[^\w./ -]", "_", facts.folder.resolve().name)


def _picture(folder: Path) -> str | None:
    """The sample grid that was made for publication, or the newest of the training."""
    if (folder / SAMPLES).is_file():
        return SAMPLES
    grids = sorted(path for path in (folder / "samples").glob("step_*.png") if path.stem[5:].isdecimal())
    return f"samples/{grids[-1].name}" if grids else None


def _evaluations(facts: ModelFacts) -> str:
    """How often the student's network is evaluated for an image, in words."""
    counts = [steps * (2 if facts.guidance else 1) for steps in facts.trained_steps]
    words = {1: "one", 2: "two"}
    return f"{' or '.join(words.get(n, str(n)) for n in counts)} evaluation{'s' if counts != [1] else ''}"


def _call_arguments(facts: ModelFacts) -> str:
    """What to pass to the pipeline: labels by name and by number, or a batch size; of one that takes an image, two samples
    of it.
    """
    classes = facts.num_classes
    if classes == 0:
        arguments = "" if facts.takes_image else "batch_size=4"
    else:
        first = (facts.id2label or {}).get("0")
        names = [0 if first is None else first.split(",")[0].strip(), min(7, (classes or 1) - 1)]
        names = names[:1] if facts.takes_image else names
        arguments = f"class_labels={json.dumps(names, ensure_ascii=not ''.join(map(str, names)).isprintable())}"
    if facts.takes_image:
        arguments = ", ".join(filter(None, ["image=image", "num_images_per_input=2", arguments]))
    return arguments if facts.is_student else f"{arguments}, num_inference_steps=50"


def _references(facts: ModelFacts) -> list[str]:
    """BibTeX of the three works, of what the recipe adds, and of the teacher's architecture and path."""
    keys = ["adversarial_distillation", "kornilov2025realuid", "zhou2024sid"] if facts.is_student else []
    kind = (facts.settings.get("adversarial") or {}).get("kind")
    if facts.is_student and kind == "encoder":
        keys.append("zhou2024sida")
    if (facts.settings.get("flow_map") or {}).get("weight"):
        keys.append("tong2025freeflow")
    if facts.texts:
        keys.append("zhou2025siddit")
    if facts.settings.get("critic_training_guidance_scale", 1) != 1:
        keys.append("zhou2024lsg")
    if facts.settings.get("objective") == "dmd2" or (facts.is_student and kind == "head"):
        keys.append("yin2024dmd2")
    for prefix, key in (("SiT", "ma2024sit"), ("EDM2", "karras2024edm2"), ("EDM", "karras2022edm")):
        if facts.network_class.startswith(prefix):
            keys.append(key)
            break
    keys.append(getattr(facts.interpolant, "citation", None))
    entries = re.split(r"\n(?=@)", (TEMPLATES / "references.bib").read_text(encoding="utf-8").strip())
    by_key = {entry.split("{", 1)[1].split(",", 1)[0]: entry.strip() for entry in entries}
    return [by_key[key] for key in dict.fromkeys(keys) if key in by_key]  # a path of the user's may cite anything


def pipeline_kind(facts: ModelFacts) -> str:
    """ "student" or "teacher".

    Raises:
        InputError: when the folder holds another pipeline.
    """
    if facts.pipeline_class not in (STUDENT, TEACHER):
        raise InputError(f"{facts.folder} holds a {facts.pipeline_class}; {STUDENT} and {TEACHER} can be published.")
    return "student" if facts.is_student else "teacher"
