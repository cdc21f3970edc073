"""Runs of the real scripts in real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

#: A distillation of a few seconds; `--objective realuid` draws real images, two critic updates per generator update, on
#: augmented images.
DISTILL = """
--data.name digits --objective realuid --critic_steps 2 --augment_prob 0.3 --per_device_train_batch_size 8
--learning_rate 1e-3 --logging_steps 1 --eval_steps 1000 --save_steps 1000 --seed 3
""".split()


def command(script: str | Path, *arguments: str, processes: int = 1) -> list[str]:
    """The script (of training/, or a path) under `accelerate launch`, on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    if processes > 1:
        launch += ["--multi_gpu", "--main_process_port", "0"]
    return [*launch, str(ROOT / "training" / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*arguments: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command to its end; a failure shows what it printed."""
    done = subprocess.run(
        list(map(str, arguments)), env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300, **kwargs
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def metrics(folder: Path, *names: str) -> list[tuple]:
    """The named values of each line of metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in ("step", *names)) for line in lines]
