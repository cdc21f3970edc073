"""The real scripts and clients against a double of the Hub: what arrives, what loads, what is refused and how."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_sit
from hub_double import READ_TOKEN, TOKEN, Hub
from huggingface_hub import ModelCard, SpaceCardData
from PIL import Image, ImageChops

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def student(teacher_folder, tmp_path):
    """A student's folder, as small as they come."""
    teacher = InterpolantPipeline.from_pretrained(teacher_folder)
    pipeline = OneStepInterpolantPipeline(
        tiny_sit(seed=1, num_classes=10), teacher.scheduler, id2label=teacher.config.id2label
    )
    pipeline.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def in_process(
    hub, tmp_path, *arguments, token=TOKEN, package=True, input=None, **environment
) -> subprocess.CompletedProcess:
    """Python in a process of its own that takes the double for the Hub; without the package it cannot import it."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN", "PYTHONPATH")
    }
    settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf-home"), HF_HUB_DISABLE_XET="1", OMP_NUM_THREADS="1")
    settings |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"} | ({"HF_TOKEN": token} if token else {}) | environment
    if package:
        settings.setdefault("PYTHONPATH", str(ROOT / "src"))
    else:
        hidden = tmp_path / "hidden" / "si_distill"
        hidden.mkdir(parents=True, exist_ok=True)
        (hidden / "__init__.py").write_text("raise ImportError('this machine does not have the package')\n")
        settings["PYTHONPATH"] = str(hidden.parent)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**kept, **settings}, cwd=tmp_path, text=True, capture_output=True, timeout=300, input=input,
    )  # fmt: skip


def publish(hub, tmp_path, run, *arguments, repo_id="user/student", **kwargs):
    script = ROOT / "pipelines" / "publish.py"
    return in_process(hub, tmp_path, script, "--pipeline", run, "--repo-id", repo_id, *arguments, **kwargs)


STRANGER = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("user/student", trust_remote_code=True, revision=sys.argv[1])
assert "si_distill" not in sys.modules
pipe(["3"], generator=torch.Generator().manual_seed(5)).images[0].save("stranger.png")
pipe = DiffusionPipeline.from_pretrained("user/student", trust_remote_code=True, variant="bf16", dtype=torch.bfloat16)
pipe(["3"], generator=torch.Generator().manual_seed(5))
"""

OWNER = """
import sys, torch
from si_distill import OneStepInterpolantPipeline
pipe = OneStepInterpolantPipeline.from_pretrained("user/student")
assert not [name for name in sys.modules if name.startswith("diffusers_modules")], "code of the repository ran"
pipe(["3"], generator=torch.Generator().manual_seed(5)).images[0].save("owner.png")
pipe = OneStepInterpolantPipeline.from_pretrained(sys.argv[2])
print(pipe.push_to_hub("user/pushed", private=True, license="mit", variant="bf16"))
"""


def test_publish_load_push_and_update(hub, student, teacher_folder, tmp_path):
    (student / "evaluation.json").write_text("{}")
    done = publish(hub, tmp_path, student, "--private", "--license", "mit", "--variant", "bf16")
    assert done.returncode == 0, done.stderr
    assert len(hub.commits("user/student")) == 2  # the empty repository, and everything
    revision = hub.commits("user/student")[-1]
    assert f'revision="{revision}"' in done.stdout
    first = hub.files("user/student")
    assert {"README.md", "model_index.json", "pipeline.py", "samples.png", WEIGHTS} <= first.keys()
    assert not [name for name in first if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]

    expected = OneStepInterpolantPipeline.from_pretrained(student)(["3"], generator=torch.Generator().manual_seed(5))
    for code, picture, package in ((STRANGER, "stranger.png", False), (OWNER, "owner.png", True)):
        done = in_process(hub, tmp_path, "-c", code, revision, student, package=package)
        assert done.returncode == 0, done.stderr
        assert ImageChops.difference(Image.open(tmp_path / picture), expected.images[0]).getbbox() is None

    # `push_to_hub` of the class uploads what the script uploads.
    assert done.stdout.strip() == f"{hub.url}/user/pushed"
    pushed = hub.files("user/pushed")
    assert first.keys() == pushed.keys()
    assert not {name for name in first if first[name] != pushed[name].replace(b"pushed", b"student")}
    assert all(hub.repositories["model", name]["private"] for name in ("user/student", "user/pushed"))

    # A second publication updates, and removes what it no longer has.
    hub.add("user/student", {**first, "notes.txt": b"the owner's"})
    (student / "evaluation.json").unlink()
    scheduler = OneStepInterpolantPipeline.from_pretrained(student).scheduler
    OneStepInterpolantPipeline(tiny_sit(seed=2, num_classes=10), scheduler).save_pretrained(student)
    done = publish(hub, tmp_path, student, "--space", "--teacher-repo-id", "user/teacher")
    assert done.returncode == 0, done.stderr
    assert len(hub.commits("user/student")) == 4
    second = hub.files("user/student")
    # Old weights in another precision would be another model.
    assert first.keys() - second.keys() == {"evaluation.json", WEIGHTS.replace(".safetensors", ".bf16.safetensors")}
    assert second["notes.txt"] == b"the owner's"
    assert second[WEIGHTS] == (student / WEIGHTS).read_bytes() != first[WEIGHTS]

    # The Space shows that very revision with the package that lies in it, and never fetches the repository's code.
    files = [path for path in teacher_folder.rglob("*") if path.is_file()]
    hub.add("user/teacher", {path.relative_to(teacher_folder).as_posix(): path.read_bytes() for path in files})
    space = tmp_path / "space"
    for name, data in hub.files("user/student", "space").items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(data)
    assert {"app.py", "requirements.txt", "README.md", "si_distill/__init__.py"} <= hub.files(
        "user/student", "space"
    ).keys()
    data = SpaceCardData(**ModelCard.load(space / "README.md").data.to_dict())
    assert (data.sdk, data.app_file, data.models) == ("gradio", "app.py", ["user/student", "user/teacher"])
    hub.add("user/student", {"README.md": b"a later main that nobody looked at"})
    shutil.rmtree(tmp_path / "hf-home")
    done = in_process(hub, tmp_path, "-c", VISITOR, space, token=None, PYTHONPATH=str(space))
    assert done.returncode == 0, done.stderr
    pipeline = OneStepInterpolantPipeline.from_pretrained(student)
    expected = pipeline([3], generator=torch.Generator().manual_seed(5)).images[0]
    assert ImageChops.difference(Image.open(tmp_path / "visitor.png"), expected).getbbox() is None
    assert not list((tmp_path / "hf-home").rglob("*.py"))


VISITOR = """
import sys
from pathlib import Path
import si_distill
from students import Students, configured, sample_rows
space = Path(sys.argv[1])
assert Path(si_distill.__file__).parent == space / "si_distill"
(choice,) = configured(space / "space.json")
assert (choice.student, choice.teacher, len(choice.revision)) == ("user/student", "user/teacher", 40)
students = Students()
results = list(students.sample(*students.prepare(choice, compare=True), [3], 1, 5, 4))
assert [result.evaluations for result in results] == [1, 4]
pipe = si_distill.OneStepInterpolantPipeline.from_pretrained(students.folder(choice))
sample_rows(pipe, [3], 1, 5)[0][0].save("visitor.png")
"""

#: Calls the script once for each [token, argument, …] of the standard input, and prints what `script_main` would see.
CALLS = """
import contextlib, io, json, os, runpy, sys
main = runpy.run_path(sys.argv[1])["main"]
results = []
for token, *arguments in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            main(arguments)
        except Exception as raised:
            error = raised
    results.append([type(error).__name__, str(error), printed.getvalue()])
print(json.dumps(results))
"""


def test_every_failure_is_a_sentence_and_what_was_staged_is_kept(hub, student, teacher_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    (tmp_path / "empty").mkdir()
    bridge = tmp_path / "bridge"
    scheduler = StochasticInterpolantScheduler(interpolant="bridge", prediction_type="sample")
    OneStepInterpolantPipeline(tiny_sit(condition_channels=1), scheduler).save_pretrained(bridge)
    hub.add("user/taken", {"weights.bin": b"somebody's"})
    hub.add("user/teacher", {"model_index.json": json.dumps({"_class_name": "InterpolantPipeline"}).encode()})
    hub.add("user/public", {".gitattributes": b""})
    hub.refuse = {"user/forbidden/commit": 403, "user/broken/commit": 500}
    hub.before_commit = lambda repo_id: repo_id == "user/raced" and hub.add(repo_id, {".gitattributes": b"changed"})
    before_staging = [
        (TOKEN, tmp_path / "nowhere", "user/x", [], "There is no folder"),
        (TOKEN, tmp_path / "empty", "user/x", [], "is not a pipeline folder"),
        (TOKEN, teacher, "user/x", ["--space"], "a Space shows a student"),
        (TOKEN, bridge, "user/x", ["--space"], "a student that takes images, which the Space cannot upload"),
        (TOKEN, teacher, "user/x", ["--variant", "fp8"], "`variant` is 'fp8'"),
        (TOKEN, student, "x", [], "does not say whose it is"),
        (TOKEN, student, "user/no such", ["--dry-run"], "cannot be the name of a repository"),
        (TOKEN, student, "user/x", ["--teacher-repo-id", "../x", "--dry-run"], "'../x' cannot be the name of"),
        (TOKEN, student, "user/x", ["--license", "my own", "--dry-run"], "`license` 'my own' is no identifier"),
    ]
    refused = [
        ("", student, "user/x", [], "There is no token of the Hub"),
        (READ_TOKEN, student, "user/x", [], "may only read"),
        (TOKEN, student, "stranger/x", [], "may not write to 'stranger'"),
        (TOKEN, student, "user/taken", [], "is taken: its repository holds other files"),
        (TOKEN, student, "user/teacher", [], "holds a InterpolantPipeline"),
        (TOKEN, student, "user/public", ["--private"], "exists and is public"),
    ]
    failed = [
        ("hf_wrong", student, "user/x", [], "does not accept the token"),
        (TOKEN, student, "user/x", ["--license", "none-such"], "must be one of the list"),
        (TOKEN, student, "user/forbidden", [], "no permission to write to user/forbidden"),
        (TOKEN, student, "user/broken", [], "an error of its own (500)"),
        (TOKEN, student, "user/raced", [], "somebody else changed user/raced"),
    ]
    cases = [*before_staging, *refused, *failed]
    calls = [[token, "--pipeline", str(run), "--repo-id", name, *more] for token, run, name, more, _ in cases]
    calls.append(["", "--pipeline", str(student), "--repo-id", "user/x", "--dry-run"])
    done = in_process(hub, tmp_path, "-c", CALLS, ROOT / "pipelines/publish.py", token=None, input=json.dumps(calls))
    assert done.returncode == 0, done.stderr
    *results, dry_run = json.loads(done.stdout)
    for (*_, words), (kind, text, _) in zip(cases, results, strict=True):
        assert words in text
        assert kind == ("PublishError" if words in {case[-1] for case in failed} else "InputError")
        assert ("is kept in" in text) == (words not in {case[-1] for case in before_staging})
    assert not any(WEIGHTS in files for name in hub.repositories for files in [hub.files(name[1])])
    assert not (teacher / "hub").exists()

    staged = student / "hub" / "model"
    assert dry_run[0] == "NoneType"
    for path in (path for path in staged.rglob("*") if path.is_file()):
        assert f"{path.stat().st_size:,}  {path.relative_to(staged)}\n" in dry_run[2]
    assert OneStepInterpolantPipeline.from_pretrained(staged)([1]).images[0].size == (8, 8)


def test_without_a_network_the_script_ends_with_a_sentence_and_its_code(hub, student, tmp_path):
    done = publish(hub, tmp_path, student, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 4, done.stderr
    assert "no connection to http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert OneStepInterpolantPipeline.from_pretrained(student / "hub" / "model")([1])


def test_a_training_publishes_its_end(hub, teacher_folder, tmp_path):
    arguments = "--max_steps 1 --per_device_train_batch_size 4 --push_to_hub --hub_model_id user/trained".split()
    places = ["--teacher", teacher_folder, "--output_dir", tmp_path / "run"]
    done = in_process(hub, tmp_path, ROOT / "training/train_distill.py", *places, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"Published: {hub.url}/user/trained at {hub.commits('user/trained')[-1]}" in done.stdout
    files = hub.files("user/trained")
    assert files[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert {"facts.json", "config.yaml", "metrics.jsonl"} <= files.keys()
    assert str(tmp_path).encode() not in b"".join(data for name, data in files.items() if name != WEIGHTS)


def test_pickled_weights_are_not_loaded(student):
    weights = student / WEIGHTS
    torch.save(tiny_sit(seed=1, num_classes=10).state_dict(), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        OneStepInterpolantPipeline.from_pretrained(student)
