"""Distillation of stock text-to-image pipelines by the real script: adapters, several processes, kills."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, environment, metrics
from test_distributed import training
from tiny_pipelines import ALL, build, save_clip

from si_distill.commands.precompute_texts import main as precompute
from si_distill.commands.train_distill import main
from si_distill.settings import parse_settings
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run
from si_distill.training.dry_run.text import described_text_teacher

LOSSES = ("critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm", "field_distance")
PROMPTS = ["a red fox", "two boats", "a cat", "a dog in the snow"]
SETTINGS = """
--data.name text --text.height 32 --text.width 64 --max_steps 4 --eval_steps 4 --save_steps 2 --logging_steps 1
--learning_rate 1e-3 --adam_epsilon 1e-3 --lora_rank 4
""".split()
GUIDED = """
--guidance_scale 3 --critic_guidance_scale 2 --critic_class_dropout_prob 0.25 --student_class_dropout_prob 0.25
""".split()
#: Parameters in millions, as their publishers say or their configs give.
PUBLISHED = {
    "sd35_medium": 2243,
    "sd35_medium_full": 2243,
    "flux1_dev": 11901,
    "sana_1600m": 1604,
    "lumina2": 2610,
    "z_image": 6155,
    "sdxl_dmd2": 2567,
    "sd15_lsg": 860,
}
#: Networks instead of adapters, which learn more slowly.
WHOLE = ["--lora_rank", "null", "--learning_rate", "1e-4"]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
#: Two processes with one prompt each make the update of one process with two.
ONE, TWO = (["--per_device_train_batch_size", size] for size in ("2", "1"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in ALL:
        build(name).save_pretrained(folder / name)
    return folder


def arguments(places, name, output, *more):
    longest = 200 if name in ("lumina2", "qwen", "z_image") else 48  # with what they put around a prompt
    limits = [] if name in ("sd15", "sdxl") else ["--text.max_length", longest]
    told = ["--text.told_guidance", "3.5"] if name == "flux" else []
    given = ["--teacher", places / name, "--data.data_files", places / "prompts.txt", "--output_dir", places / output]
    return list(map(str, [*SETTINGS, *limits, *told, *given, *more]))


def weights(folder):
    """Adapters of the critic, the student and the average in the newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    return {file.name: load_file(file) for file in sorted(newest.glob("model*.safetensors"))}


def assert_same(folder, expected, exactly):
    for found, wanted in zip(metrics(folder, *LOSSES), metrics(expected, *LOSSES), strict=True):
        assert found == (wanted if exactly else pytest.approx(wanted, rel=5e-4, abs=1e-6))
    given, other = weights(folder), weights(expected)
    assert given.keys() == other.keys()
    assert len(given) == 3
    for file, tensors in other.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(given[file][name], tensor, rtol=0, atol=0 if exactly else 2e-5)


@pytest.mark.parametrize("objective", ["sid", "gap", "dmd2"])
@pytest.mark.parametrize("name", ALL)
def test_the_game_is_played(places, name, objective):
    steps = ["--student_steps", "1", "4", "--student_stepping", "ddim"] if objective == "gap" else []
    checkpointing = ["--gradient_checkpointing", "true"]
    output = places / f"{name}-{objective}"
    main(arguments(places, name, output, *ONE, *GUIDED, *steps, *checkpointing, "--objective", objective))
    lines = metrics(output, *LOSSES)
    assert len(lines) == 4
    assert all(torch.tensor(line).isfinite().all() for line in lines)
    _, student, _ = weights(output).values()
    assert any(tensor.any() for name, tensor in student.items() if name.endswith("B.weight"))
    assert sum(tensor.numel() for tensor in student.values()) < 0.5 * sum(
        p.numel() for p in build(name).components["unet" if name in ("sd15", "sdxl") else "transformer"].parameters()
    )


@pytest.fixture(scope="module")
def measured(places):
    """Settings of measurements, of five images: two processes draw three each, and one of them is left out."""
    save_clip(places / "clip")
    (places / "five.txt").write_text("\n".join([*PROMPTS, "nine"]) + "\n")
    scored = f"--metric_for_best_model clip_score --evaluation.clip_model {places / 'clip'}".split()
    return [*scored, "--eval_metric_steps", "2", "--evaluation.prompts_file", places / "five.txt"]


@pytest.fixture(scope="module")
def alone(places, measured):
    main(arguments(places, "sd3", "alone", *ONE, *GUIDED, *measured))
    return places / "alone"


def test_a_run_leaves_a_card_of_its_student(alone):
    card = (alone / "README.md").read_text()
    assert "pipe.load_lora_weights(" in card
    assert "num_inference_steps=1" in card


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(places, alone):
    shutil.copytree(alone, places / "resumed")
    shutil.rmtree(places / "resumed" / "checkpoints" / "step_00000004")
    main(arguments(places, "sd3", "resumed", *ONE, *GUIDED, "--resume_from_checkpoint", "latest"))
    assert_same(places / "resumed", alone, exactly=True)


def test_a_run_that_got_a_signal_goes_on_as_if_it_did_not(places, alone):
    folder = places / "stopped"
    # Longer than it can last before the signal; the steps that are compared are those of the shorter run.
    given = arguments(places, "sd3", "stopped", *ONE, *GUIDED, "--max_steps", 100000, "--save_steps", 100000)
    script = [sys.executable, ROOT / "training/train_distill.py", *given]
    process = subprocess.Popen(
        script, env=environment(), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 143, printed
    assert "--resume_from_checkpoint latest" in printed
    assert "Traceback" not in printed
    (saved,) = (folder / "checkpoints").iterdir()
    reached = int(saved.name.removeprefix("step_"))
    assert metrics(folder)[-1] == (reached,)

    expected = alone
    if reached >= 4:
        expected = places / "longer"
        main(arguments(places, "sd3", "longer", *ONE, *GUIDED, "--max_steps", reached + 2))
    resume = ["--resume_from_checkpoint", "latest", "--max_steps", metrics(expected)[-1][0]]
    main(arguments(places, "sd3", "stopped", *ONE, *GUIDED, *resume))
    assert_same(folder, expected, exactly=True)
    student, other = (load_file(place / "pytorch_lora_weights.safetensors") for place in (folder, expected))
    assert all(value.equal(other[name]) for name, value in student.items())


def test_a_cache_of_texts_changes_nothing(places, alone):
    cache = places / "cache"
    given = ["--teacher", places / "sd3", "--data.name", "text", "--data.data_files", places / "prompts.txt"]
    precompute(list(map(str, [*given, "--text.max_length", 48, "--texts_dir", cache, "--dtype", "float32"])))
    main(arguments(places, "sd3", "cached", *ONE, *GUIDED, "--data.name", cache))
    assert_same(places / "cached", alone, exactly=True)


@pytest.fixture(scope="module")
def squares(places):
    """Settings of four images with captions."""
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "red", "green")]
    texts = ["a red square", "a blue square", "red", "a green square"]
    datasets.Dataset.from_dict({"image": images, "text": texts}).to_parquet(places / "squares.parquet")
    data = f"--data.name parquet --data.data_files {places / 'squares.parquet'} --data.caption_column text"
    return data.split()  # cropped to 32 × 64


def test_real_images_with_captions(places, squares, capsys):
    main(arguments(places, "sana", "real", *ONE, *squares, "--objective", "realuid", "--text.max_length", 8))
    assert len(metrics(places / "real", *LOSSES)) == 4
    assert capsys.readouterr().err.count("prompts are cut") == 1  # they are read and encoded once


@pytest.mark.parametrize("name", ALL)
def test_an_adversarial_term_looks_at_the_middle(places, squares, name):
    kind = ["--adversarial.kind", "encoder" if name in ("sana", "sd15") else "head", "--gradient_checkpointing", "true"]
    output = places / f"{name}-judged"
    main(arguments(places, name, output, *ONE, *squares, *kind, "--max_steps", "2"))
    lines = metrics(output, "critic_adversarial_loss", "generator_adversarial_loss")
    assert all(math.isfinite(value) and value > 0 for line in lines for value in line[1:]), lines


@pytest.fixture(scope="module")
def whole(places, measured):
    main(arguments(places, "sana", "whole", *ONE, *measured, *WHOLE))
    return places / "whole"


def test_whole_networks(places, whole):
    saved = SanaPipeline.from_pretrained(whole)
    teacher = SanaPipeline.from_pretrained(places / "sana")
    pairs = list(zip(saved.transformer.parameters(), teacher.transformer.parameters(), strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)


def scores(folder):
    return [json.loads(line)["clip_score"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_two_processes_are_one(places, alone, whole, measured):
    given = [*TWO, *GUIDED, *measured]
    entries = [
        training("train_distill", arguments(places, "sd3", "ddp", *given), False, None),
        training("train_distill", arguments(places, "sd3", "fsdp", *given), True, None),
        training("train_distill", arguments(places, "sana", "fsdp-whole", *TWO, *measured, *WHOLE), True, None),
    ]
    plan = places / "plan.json"
    plan.write_text(json.dumps([{"ranks": 2, "copies": [], "trainings": entries}]))
    command = [sys.executable, ROOT / "tests/training/ranks.py", plan]
    subprocess.run(command, env=environment(), cwd=ROOT, timeout=300, check=True)
    assert json.loads((places / "0.codes").read_text()) == [0, 0], (places / "0.0.log").read_text()
    assert_same(places / "ddp", alone, exactly=False)
    for found, wanted in zip(metrics(places / "fsdp", *LOSSES), metrics(alone, *LOSSES), strict=True):
        assert found == pytest.approx(wanted, rel=5e-4, abs=1e-6)
    for name, one in (("ddp", alone), ("fsdp", alone), ("fsdp-whole", whole)):
        assert scores(places / name) == pytest.approx(scores(one), rel=1e-2)
        assert (places / name / "best" / "student.json").exists()
    saved, wanted = (load_file(folder / TRANSFORMER) for folder in (places / "fsdp-whole", whole))
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "text-to-image").glob("*.yaml")), ids=lambda path: path.stem
)
def test_recipes_describe_their_pipelines(path, tmp_path):
    settings = parse_settings(DistillConfig, ["--config", str(path), "--output_dir", str(tmp_path)])
    teacher, _ = described_text_teacher(settings)
    millions = sum(p.numel() for name, p in teacher.transformer.base.named_parameters() if ".lora_" not in name) / 1e6
    assert millions == pytest.approx(PUBLISHED[path.stem], rel=0.01)
    assert teacher.size == ((512, 512) if path.stem == "sd15_lsg" else (1024, 1024))


def test_what_the_page_says_that_sd35_needs(tmp_path):
    path = ROOT / "configs/text-to-image/sd35_medium.yaml"
    settings = parse_settings(DistillConfig, ["--config", str(path), "--output_dir", str(tmp_path)])
    report = dry_run(settings)
    assert "2,243,171,520 parameters" in report
    assert "rank 64 on 337 layers, 93,978,624 parameters each" in report
    assert "about 9.9" in report.split("memory:")[1].split("GiB")[0]
