"""Training on streams: killed and resumed bit for bit, with other workers, with a limit of corrupt images."""

import io
import logging
import shutil
import signal
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file
from script_runs import DISTILL, ROOT, metrics, run
from trainer_builders import distillation, teaching

from si_distill.errors import InputError, TrainingStopped

SCRIPT, KILLER = ROOT / "training/train_distill.py", ROOT / "tests/training/kill_in_save.py"
PER_FILE, CORRUPT = 20, 31


def grey_png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()[:60] if number == CORRUPT else buffer.getvalue()


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> list[str]:
    """Settings of four Parquet files of grey 8 × 8 images in ten classes, one of which is cut off."""
    folder = tmp_path_factory.mktemp("stream")
    names = [str(n) for n in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for part in range(4):
        numbers = range(part * PER_FILE, (part + 1) * PER_FILE)
        rows = {
            "image": [{"bytes": grey_png(n), "path": f"{n}.png"} for n in numbers],
            "label": [n % 10 for n in numbers],
        }
        pq.write_table(pa.table(rows, schema=features.arrow_schema), folder / f"{part}.parquet")
    settings = ["--data.name", "parquet", "--data.data_files", folder / "*.parquet", "--data.streaming", "true"]
    return [*map(str, settings), "--data.shuffle_buffer_size", "15"]


@pytest.fixture(scope="module")
def arguments(teacher_folder, stream):
    steps = ["--max_steps", "12", "--save_steps", "5", "--dataloader_num_workers", "2"]
    return [*DISTILL, *stream, "--teacher", str(teacher_folder), *steps]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """96 of 79 readable images, so that the first epoch ends on the way."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run(sys.executable, SCRIPT, *arguments, "--output_dir", folder)
    assert f"Skipping an image of parquet that cannot be read: {CORRUPT}.png" in done.stderr
    assert metrics(folder, "corrupt_images")[-1] == (12, 1)
    return folder


def test_a_killed_run_on_a_stream_resumes_bit_for_bit(arguments, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    killed = run(sys.executable, KILLER, 10, "renaming", *arguments, "--output_dir", folder, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(sys.executable, SCRIPT, *arguments, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    names = (
        "critic_loss",
        "generator_loss",
        "critic_grad_norm",
        "generator_grad_norm",
        "sample_mean",
        "corrupt_images",
    )
    assert metrics(folder, *names) == metrics(uninterrupted, *names)
    found, expected = (
        load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (folder, uninterrupted)
    )
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_other_workers_start_the_data_in_a_new_order_and_say_so(arguments, uninterrupted, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints/step_00000012")
    teacher = arguments[arguments.index("--teacher") + 1]
    trainer = distillation(
        teacher, folder, *arguments, "--dataloader_num_workers", 1, "--resume_from_checkpoint", "latest"
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "the data start in a new order" in caplog.text
    steps = metrics(folder, "critic_loss")
    assert [step for step, _ in steps] == list(range(1, 13))
    assert steps[:10] == metrics(uninterrupted, "critic_loss")[:10]
    assert steps[10:] != metrics(uninterrupted, "critic_loss")[10:]


def test_a_teacher_learns_from_a_stream_until_too_much_of_it_is_corrupt(stream, tmp_path):
    limit = [*stream, "--save_steps", 2, "--max_steps", 30, "--data.max_corrupt_images"]
    trainer = teaching(tmp_path / "run", *limit, 0)
    assert trainer.data.class_names[9] == "9"
    with pytest.raises(TrainingStopped, match=r"1 images of parquet .*31.png.*raise the limit"):
        trainer.train()
    step = metrics(tmp_path / "run")[-1][0]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} <= {
        f"step_{n:08d}" for n in range(step + 1)
    }
    trainer = teaching(tmp_path / "run", *limit, 5, "--resume_from_checkpoint", "latest")
    trainer.train()
    assert metrics(tmp_path / "run", "corrupt_images")[-1] == (30, 1)


def test_what_a_stream_cannot_give_is_refused(stream, teacher_folder, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=r"`eval_metric_steps` .* a stream .* `evaluation.reference`"):
        teaching(folder, *stream, "--eval_metric_steps", 5)
    with pytest.raises(InputError, match=r"4 shard\(s\).* but 5 processes would read it"):
        teaching(folder, *stream, "--dataloader_num_workers", 5)
    assert not folder.exists()
