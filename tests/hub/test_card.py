"""The model card: what it says is in the files, what is in no file is said to be missing, and the Hub can read it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import tiny_sit
from huggingface_hub import ModelCard
from PIL import Image

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.hub.card import GENERATED, TEMPLATES, render_card, write_card
from si_distill.hub.card_tables import MISSING
from si_distill.hub.facts import read_facts
from si_distill.hub.plain_text import without_paths
from si_distill.hub.staging import stage_model
from si_distill.settings import settings_to_dict
from si_distill.training.distillation.config import DistillConfig

ROOT = Path(__file__).parent.parent.parent
FIGURES = (
    "KID",
    "KID deviation",
    "precision",
    "recall",
    "inception score",
    "inception score deviation",
    "label accuracy",
)


def row(kind: str, name: str, evaluations: int, distance: float) -> dict:
    figures = {"network evaluations": evaluations, "Fréchet distance": distance, "images per second": 8166.2}
    intervals = {"Fréchet distance": [distance - 0.01, distance + 0.01]}
    return {"generator": name, **figures, **dict.fromkeys(FIGURES), "intervals": intervals, "made": {"kind": kind}}


EVALUATION = {
    "evaluator": "torch-fidelity 0.4.0",
    "distance": "Fréchet distance",
    "features": {"features": "si-distill-pixels", "weights": None, "version": "1"},
    "reference": {"name": "sklearn-digits", "split": "train", "images": 1797},
    "num_samples": 500,
    "class_balance": "as in sklearn-digits",
    "seed": 0,
    "intervals": "95 %",
    "device": "cpu",
    "date": "2026-11-21",
    "student": "/home/someone/runs/student",
    "rows": [row("teacher", "teacher, 50 steps", 50, 0.3351), row("student", "student, 1 step", 1, 0.3559)],
}


@pytest.fixture
def run(tmp_path):
    """A student's run folder with everything that a run and its evaluation leave."""
    folder = tmp_path / "digits-student"
    OneStepInterpolantPipeline(tiny_sit(num_classes=10), StochasticInterpolantScheduler()).save_pretrained(folder)
    settings = DistillConfig(
        output_dir="runs/digits-student", teacher="/home/someone/teacher", objective="realuid",
        objective_kwargs={"alpha": 0.92, "beta": 0.94}, guidance_scale=1.5, max_steps=300,
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_to_dict(settings)))
    # 100 images at 10 a second, then 200 at 40: 15 seconds.
    lines = [
        {"step": 100, "images": 100, "images_per_second": 10},
        {"step": 300, "images": 300, "images_per_second": 40},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40')
    session = {"first_step": 0, "command": ["training/train_distill.py", "--objective_kwargs", "{alpha: 0.92}"]}
    session |= {"hardware": "8 × NVIDIA H100", "processes": 8, "versions": {"torch": "2.15.0"}}
    facts = {
        "teacher": {
            "name": "lab/sit",
            "source": "hub",
            "revision": "c0ffee",
            "network": {"class": "SiT", "parameters": 7},
        },
        "data": {"name": "lab/pictures", "source": "hub", "split": "train", "images": 60000},
        "sessions": [session, {**session, "first_step": 200, "hardware": "4 × NVIDIA H200"}],
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


def rows_of(card: ModelCard) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def test_the_card_says_what_the_files_say(run):
    card = render_card(read_facts(run), repo_id="user/student", license="mit", variants=("bf16",))
    rows = rows_of(card)
    assert rows["Teacher"] == "[lab/sit](https://huggingface.co/lab/sit), revision c0ffee"
    assert rows["Guidance of the teacher"] == "1.5, now inside the student"
    assert rows["Objective"] == "`realuid` (alpha 0.92, beta 0.94)"
    assert rows["Critic (a, b, c)"] == rows["Generator (a, b, c)"] == "(0.92, 0.94, 0.92)"
    assert rows["Data"] == "lab/pictures, split train, 60,000 images"
    assert (rows["Images seen"], rows["Time in iterations"]) == ("300", "15 s")
    assert rows["Hardware"] == "8 × NVIDIA H100; 4 × NVIDIA H200"
    assert rows["Resumed"] == "1 times"
    assert rows["Average of the weights (EMA)"] == "decay 0.999"
    assert rows["Network evaluations"] == "1 per image, without guidance"
    assert "| student, 1 step | 1 | 0.356 [0.346, 0.366] | 8,166 |" in card.text
    for words in (
        "torch-fidelity 0.4.0; features si-distill-pixels", "500 images per row", "reference sklearn-digits (1,797 images)",
        "accelerate launch --num_processes 8 training/train_distill.py --objective_kwargs '{alpha: 0.92}'",
        'OneStepInterpolantPipeline.from_pretrained("user/student", revision=revision)',
        'DiffusionPipeline.from_pretrained("user/student", trust_remote_code=True, revision=revision)',
        'variant="bf16", dtype=torch.bfloat16', "@misc{adversarial_distillation", "@article{kornilov2025realuid",
        "@inproceedings{zhou2024sid", "@inproceedings{ma2024sit", "@inproceedings{lipman2023flow",
    ):  # fmt: skip
        assert words in card.text
    assert MISSING not in card.text
    assert "/home/someone" not in str(card)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["si-distill", "train-distill", "--seed", "1"], "\nsi-distill train-distill --seed 1\n"),
        (
            ["-m", "si_distill.commands.train_distill"],
            "launch --num_processes 8 -m si_distill.commands.train_distill\n",
        ),
    ],
)
def test_the_card_shows_the_command_of_an_installed_package(run, command, shown):
    facts = json.loads((run / "facts.json").read_text())
    facts["sessions"][0]["command"] = command
    (run / "facts.json").write_text(json.dumps(facts))
    assert shown in render_card(read_facts(run)).text


def test_the_metadata_survives_the_hubs_own_classes(run):
    card = ModelCard(str(render_card(read_facts(run), repo_id="user/student", license="mit")))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "diffusers",
        "unconditional-image-generation",
        "mit",
    )
    assert (data.base_model, data.datasets) == ("lab/sit", ["lab/pictures"])
    assert {"one-step", "distillation", "realuid", "linear", "class-conditional-image-generation"} <= set(data.tags)
    (result,) = data.eval_results  # the student's own row, and quality only
    assert (result.metric_type, result.metric_value) == ("frechet-distance", 0.3559)  # not an FID: other features
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == (
        "lab/pictures",
        "sklearn-digits",
        "train",
    )
    assert result.metric_args["num_samples"] == 500
    assert result.metric_args["features"]["features"] == "si-distill-pixels"
    assert result.metric_args["interval"] == pytest.approx([0.3459, 0.3659])
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "distance": "FID"}))
    assert ModelCard(str(render_card(read_facts(run)))).data.eval_results[0].metric_type == "fid"


def test_missing_facts_are_said_as_missing_and_a_folder_is_no_base_model(run):
    for name in ("config.yaml", "metrics.jsonl", "facts.json", "evaluation.json"):
        (run / name).unlink()
    card = render_card(read_facts(run))
    rows = rows_of(card)
    for name in (
        "Teacher", "Its network", "Objective", "Data", "Iterations", "Images seen", "Time in iterations", "Hardware",
        "Precision", "Average of the weights (EMA)", "Learning rate", "Seed", "Versions",
    ):  # fmt: skip
        assert rows[name] == MISSING, name
    assert "No evaluation is recorded" in card.text
    assert "The training's settings are not recorded" in card.text
    assert "None was given" in card.text
    assert card.data.base_model is None
    assert card.data.eval_results is None
    (run / "facts.json").write_text(json.dumps({"teacher": {"name": "runs/digits-teacher", "source": "local"}}))
    card = render_card(read_facts(run))
    assert card.data.base_model is None
    assert rows_of(card)["Teacher"] == "`runs/digits-teacher`, a local folder"
    assert render_card(read_facts(run), teacher_repo_id="user/teacher").data.base_model == "user/teacher"


def test_a_teachers_card(tmp_path):
    network = tiny_sit(num_classes=10, class_dropout_prob=0.0)
    InterpolantPipeline(network, StochasticInterpolantScheduler(interpolant="vp")).save_pretrained(tmp_path)
    card = render_card(read_facts(tmp_path), repo_id="lab/teacher")
    assert 'InterpolantPipeline.from_pretrained("lab/teacher", revision=revision)' in card.text
    assert "num_inference_steps=50" in card.text
    assert "guidance is not possible" in card.text
    assert "@inproceedings{song2021score" in card.text
    assert "kornilov2025realuid" not in card.text
    assert "teacher" in card.data.tags


def test_a_text_of_the_owners_is_never_replaced(run):
    write_card(run)
    first = (run / "README.md").read_text()
    (run / "evaluation.json").unlink()
    write_card(run)
    assert (run / "README.md").read_text() != first
    own = first.replace(GENERATED, "") + "What I know of it.\n"
    (run / "README.md").write_text(own)
    write_card(run)
    assert (run / "README.md").read_text() == own


def test_the_code_of_the_card_runs(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    card = render_card(read_facts(run)).text.replace("runs/digits-student", "digits-student")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for block in blocks:
        found = {}
        exec(block, found)
        assert len(found["images"]) == 2
    assert len(blocks) == 2


@pytest.mark.parametrize(
    ("interpolant", "start"),
    [
        ("bridge", "the reference image, with 1 channels of noise"),
        ("linear", "noise; the network sees a reference image"),
    ],
)
def test_the_code_of_a_card_for_images_runs(interpolant, start, tmp_path, monkeypatch):
    bridge = interpolant == "bridge"
    scheduler = StochasticInterpolantScheduler(
        interpolant=interpolant, prediction_type="sample", noise_channels=int(bridge)
    )
    network = tiny_sit(num_classes=10, condition_channels=1 + bridge)
    OneStepInterpolantPipeline(network, scheduler).save_pretrained(tmp_path / "student")
    card = render_card(read_facts(tmp_path / "student"))
    assert card.data.pipeline_tag == "image-to-image"
    assert "image-generation" not in card.data.tags
    assert rows_of(card)["Starts from"] == start
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 90).save("input.png")
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for block in blocks:
        found = {}
        exec(block, found)
        assert len(found["images"]) == 2
    assert len(blocks) == 2
    # Publishing makes no picture: nobody here knows images that may be shown.
    pipeline = OneStepInterpolantPipeline.from_pretrained(tmp_path / "student")
    stage_model(pipeline, tmp_path / "hub", "user/student")
    assert not list((tmp_path / "hub").rglob("*.png"))


def test_what_is_no_pipeline_or_damaged_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"no model_index.json"):
        write_card(tmp_path)
    (run / "evaluation.json").write_text('{"rows": [{}], "student": "x"}')
    with pytest.raises(InputError, match=r"rows\[0\] has no `generator`"):
        write_card(run)
    (run / "evaluation.json").write_text('{"rows": ')
    with pytest.raises(InputError, match=r"evaluation\.json.*Restore it"):
        write_card(run)


def test_paths_of_a_machine_become_names():
    assert without_paths({"a": ["/home/x/runs/s/", "runs/s"], "b": 3}) == {"a": ["s", "runs/s"], "b": 3}


def test_templates_and_examples_are_where_they_are_looked_for():
    assert TEMPLATES.resolve() == ROOT / "model_cards"
    student, teacher = (
        ModelCard.load(ROOT / "model_cards" / "examples" / f"digits-{k}.md") for k in ("student", "teacher")
    )
    assert {result.metric_type for result in student.data.eval_results} >= {"frechet-distance", "kid", "accuracy"}
    assert (student.data.library_name, teacher.data.library_name) == ("diffusers", "diffusers")
