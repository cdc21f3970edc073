"""Cards, publications and the Space of text-to-image students: the code on the card runs as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from exported_students import save_student
from huggingface_hub import ModelCard
from PIL import Image, ImageChops

from si_distill.commands.publish import main as publish
from si_distill.errors import InputError
from si_distill.hub.card import GENERATED, write_card
from si_distill.hub.staging import listing
from si_distill.text_to_image.student import STUDENT, load_student

ROOT = Path(__file__).parents[2]
#: What a run leaves next to its student.
CONFIG = {
    "teacher": "base",
    "objective": "sid",
    "max_steps": 10,
    "seed": 0,
    "guidance_scale": 4.5,
    "learning_rate": 1e-5,
}
FACTS = {
    "teacher": {"name": "user/base", "source": "hub", "revision": None, "network": {"class": "X", "parameters": 5}},
    "sessions": [],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    save_student(root, "sd3", "lora")
    save_student(root, "sd3", "style", seed=2)
    save_student(root, "flux", "noisy", solver="renoise", student_steps=[2])
    save_student(root, "sd15", "full", lora_rank=None)
    for name in ("lora", "noisy", "full"):
        (root / name / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (root / name / "facts.json").write_text(json.dumps(FACTS))
        (root / name / "checkpoints").mkdir()
        (root / name / "checkpoints" / "state.bin").write_bytes(b"0" * 1000)
        write_card(root / name)
    return root


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_the_code_of_cards_runs_as_printed_without_the_package(root):
    """One process for all three, offline; of the second LoRA only the name is another."""
    script = "".join(
        f"{block}\nimage.save('{name}.png')\n"
        for name in ("lora", "noisy", "full")
        for block in code((root / name / "README.md").read_text(), "python")
    ).replace("user/style", "style")
    assert "set_adapters" in script
    script += "import sys\nassert 'si_distill' not in sys.modules\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name, steps in (("lora", 4), ("noisy", 2), ("full", 4)):
        student = load_student(root / name, torch.bfloat16)
        seeds = [torch.Generator().manual_seed(0)]
        (ours,) = student.images(["a red fox in the snow"], steps, seeds)
        theirs = Image.open(root / f"{name}.png")
        assert theirs.size == (32, 32)
        if name != "noisy":  # whose stock call draws from the global generator
            assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 2
    assert (root / "1-step.png").is_file()


def test_a_card_tells_what_the_files_record(root):
    card = ModelCard.load(root / "lora" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-to-image", "diffusers")
    assert {"lora", "text-to-image", "few-step", "template:sd-lora", "distillation"} <= set(card.data.tags)
    assert GENERATED in card.text
    for row in (
        r"\| Weights \| LoRA of rank 4, [0-9,]+ values \|",
        r"\| Steps \| 1 or 4, one evaluation of the network each \|",
        r"\| Trained at \| 32 × 32 pixels",
        r"\| Objective \| `sid` \|",
        r"\| Guidance of the teacher \| 4.5, now inside the student \|",
        r"\| Tokens of a prompt \| at most 64 \|",
    ):
        assert re.search(row, card.text), row
    assert "set_adapters" not in (root / "full" / "README.md").read_text()
    assert "None was given." in card.text
    noisy = (root / "noisy" / "README.md").read_text()
    assert "torch.manual_seed(0)  # this pipeline draws" in noisy
    assert "| Guidance | told to the network: 3.5 |" in noisy


def staged(root, name, *arguments):
    publish(["--pipeline", str(root / name), "--repo-id", "user/turbo", "--dry-run", *arguments])
    return root / name / "hub" / "model"


def test_a_publication_has_what_is_needed_and_pictures_of_prompts(root, capsys):
    prompts = ["two boats", 'a "quoted" fox: yes']
    folder = staged(root, "lora", "--teacher-repo-id", "user/base", "--license", "mit", "--prompts", *prompts)
    assert "Dry run: nothing was uploaded." in capsys.readouterr().out
    names = {name for name, _ in listing(folder)}
    assert names == {
        "README.md", "config.yaml", "facts.json", "samples.png", "student.json", "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json", "images/0.png", "images/1.png",
    }  # fmt: skip
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.license) == ("user/base", "mit")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert [(each["text"], each["output"]["url"]) for each in data.to_dict()["widget"]] == [
        (prompts[0], "images/0.png"),
        (prompts[1], "images/1.png"),
    ]
    card = (folder / "README.md").read_text()
    assert 'StableDiffusion3Pipeline.from_pretrained("user/base", dtype=torch.bfloat16)' in card
    assert 'pipe.load_lora_weights("user/turbo", adapter_name="student")' in card
    assert str(root) not in "".join((folder / name).read_text() for name in ("README.md", STUDENT, "facts.json"))
    assert json.loads((folder / STUDENT).read_text())["base"] == "user/base"


def test_a_merged_publication_is_the_student_as_a_whole_pipeline(root):
    folder = staged(root, "lora", "--merged", "--prompts", "two boats")
    assert {"model_index.json", "transformer", "text_encoder_3", STUDENT} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors"))
    merged, apart = (
        load_student(path).images(["two boats"], 1, [torch.Generator().manual_seed(1)])[0]
        for path in (folder, root / "lora")
    )
    assert max(high for _, high in ImageChops.difference(merged, apart).getextrema()) <= 1  # of 255
    data = ModelCard.load(folder / "README.md").data
    assert "lora" not in data.tags
    assert data.base_model == "user/base"  # of facts.json
    assert data.to_dict()["base_model_relation"] == "finetune"


def test_full_weights_are_published_without_the_rest_of_the_run(root):
    folder = staged(root, "full", "--teacher-repo-id", "user/base", "--prompts", "two boats")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.yaml", "facts.json", "samples.png", "student.json", "images", "model_index.json", "unet",
        "vae", "scheduler", "text_encoder", "tokenizer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("noisy", [], "publish that and give its name with --teacher_repo_id"),
        ("full", ["--merged"], "holds full weights, with nothing to merge"),
        ("lora", ["--variant", "bf16"], "`variant` is for pipelines of classes"),
        ("lora", ["--base", "/nowhere", "--teacher-repo-id", "user/base"], "which cannot be loaded"),
    ],
)
def test_what_cannot_be_published(root, name, arguments, said):
    with pytest.raises(InputError, match=said):
        staged(root, name, *arguments)


def test_the_space_takes_prompts(root, tmp_path):
    """Everything but the widgets, from the staged folder alone."""
    space = staged(root, "lora", "--teacher-repo-id", "user/base", "--prompts", "two boats", "--space").parent / "space"
    assert {"app.py", "text_students.py", "README.md", "requirements.txt", "si_distill"} <= {
        p.name for p in space.iterdir()
    }
    assert "peft" in (space / "requirements.txt").read_text()
    (space / "space.json").write_text(json.dumps({"students": [{"student": str(root / "lora")}]}))
    script = """
from pathlib import Path
from text_students import VisitorError, configured
import si_distill
assert Path(si_distill.__file__).parent == Path.cwd() / "si_distill"
student = configured(Path("space.json"))
result = student.draw(" two boats ", 2.0, 3, 4)
assert [image.size for image in result.images] == [(32, 32)] * 2 and result.steps == 4
assert student.draw("two boats", 1, 4, 4).images[0].tobytes() != result.images[0].tobytes()
counts = [("x", 5, 0, 4), ("x", 1, 0.5, 4), ("x", 1, 0, 3), ("x", True, 0, 4)]
for bad in [("", 1, 0, 4), ("x" * 1001, 1, 0, 4), (None, 1, 0, 4), *counts]:
    try:
        student.draw(*bad)
    except VisitorError:
        continue
    raise SystemExit(f"{bad} was drawn")
"""
    environment = {**os.environ, "PYTHONPATH": str(space), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=space, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
