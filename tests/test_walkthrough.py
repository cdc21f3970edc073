"""The commands of docs/imagenet.md: each is parsed out of the page and run, with small stand-ins under the names it uses."""

import re
import runpy
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from conversion.foreign_sit import HEADS, sit_weights
from helpers import tiny_sit
from latent_caches import tiny_autoencoder

from si_distill import InterpolantPipeline, OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/imagenet.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
CLASSES = 1000

#: What is laid over a command to make it small: trainings are dry-run, the rest is done on little.
SMALLER = {
    "convert_teacher.py": ["--num_attention_heads", str(HEADS)],  # the stand-in is of no published size
    "precompute_latents.py": [],
    "train_teacher.py": ["--dry_run"],
    "train_distill.py": ["--dry_run"],
    "evaluate.py": "--features pooled:Pooled --num_samples 8 --teacher_steps 1 --metrics fid".split(),
    "generate.py": ["--images_per_label", "1"],
    "publish.py": [],
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """An empty machine with the repository, and stand-ins for the checkpoint and what the Hub has."""
    folder = tmp_path_factory.mktemp("machine")
    for name in ("configs", "training", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in FILES:
        (folder / name).write_text(text, encoding="utf-8")
    torch.save(sit_weights(size=32, rows=CLASSES + 1), folder / "SiT-XL-2-256.pt")
    tiny_autoencoder(levels=4, scaling_factor=0.18215).save_pretrained(folder / "stabilityai/sd-vae-ft-ema")
    names = [str(n) for n in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pixels = torch.randint(256, (8, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    table = datasets.Dataset.from_dict({"image": list(pixels), "label": list(range(8))}, features)
    table.to_parquet(folder / "ILSVRC/imagenet-1k/train.parquet")
    table.to_parquet(folder / "path/to/imagenet-1k-sample/train.parquet")
    return folder


def leave_pipeline(script: str, arguments: list[str]) -> None:
    """What a training that was only dry-run would have left."""
    kind, config = {
        "train_teacher.py": (InterpolantPipeline, TeacherConfig),
        "train_distill.py": (OneStepInterpolantPipeline, DistillConfig),
    }[Path(script).name]
    network = tiny_sit(sample_size=32, patch_size=8, in_channels=4, num_classes=CLASSES)
    labels = {0: "tench", 1: "goldfish", 207: "golden retriever"}
    pipeline = kind(network, StochasticInterpolantScheduler(), tiny_autoencoder(levels=4), labels)
    pipeline.save_pretrained(parse_settings(config, arguments).output_dir)


def script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The script of a command, behind `python` or the launcher, whose own options the launcher must know."""
    if words[0] == "python":
        return words[1], words[2:]
    assert words[:2] == ["accelerate", "launch"]
    launch = launch_command_parser().parse_args(words[2:])
    config = load_config_from_file(launch.config_file)
    assert launch.num_processes in (None, config.num_processes)
    return launch.training_script, launch.training_script_args


def test_every_command_of_the_page_runs(machine, monkeypatch, capsys):
    monkeypatch.chdir(machine)
    monkeypatch.syspath_prepend(str(machine))
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] in ("python3", "pip"):
            assert line in ("python3 -m venv .venv && . .venv/bin/activate", "pip install -e .")
            continue
        script, arguments = script_and_arguments(words)
        if script in dict(FILES):
            runpy.run_path(script)
            continue
        kind = Path(script).name
        runpy.run_path(script)["main"]([*arguments, *SMALLER[kind]])
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        printed = capsys.readouterr().out
        if kind in ("train_teacher.py", "train_distill.py"):
            assert "Dry run: nothing was" in printed, line
            if "--dry_run" not in arguments:
                leave_pipeline(script, arguments)
        elif kind == "publish.py":
            assert "Dry run: nothing was" in printed, line
        elif kind == "precompute_latents.py":
            assert "Finished: 8 images" in printed, line
        elif kind == "evaluate.py":
            assert "| student, 1 step | 1 |" in printed, line
        elif kind == "generate.py":
            assert (machine / arguments[arguments.index("--out") + 1]).is_file(), line
        else:
            assert "saved and loaded alike" in printed, line


def test_what_a_command_reads_is_what_another_one_writes():
    text = " ".join(COMMANDS)
    configs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "configs/imagenet256").glob("*.yaml"))
    read = re.findall(r"--(?:pipeline|teacher|vae|data\.name) ((?:runs|data)/\S+)", text)
    assert len(read) >= 8
    for folder in set(read):
        places = [
            f"--out {folder} ",
            f"--output_dir {folder} ",
            f"output_dir: {folder}\n",
            f'save_pretrained("{folder}")',
        ]
        assert any(place in text + configs + PAGE for place in places), folder
