"""The best of a text-to-image run by a metric: its figure is that of evaluate.py, and the run is the same without."""

import json
import logging
import shutil

import datasets
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from script_runs import metrics
from tiny_pipelines import build, save_clip

from si_distill.commands import evaluate, generate, precompute_texts, train_distill, train_teacher
from si_distill.errors import InputError

PROMPTS = ["a red fox", "two boats", "a cat", "a dog in the snow", "nine"]
#: Settings under which captions have no images to be compared with.
CAPTIONS = ["--data.caption_column", "text", "--evaluation.prompts_file", "{places}/prompts.txt"]
SMALL = """
--text.height 8 --text.width 8 --text.max_length 48 --max_steps 4 --eval_steps 100 --save_steps 100 --logging_steps 1
--learning_rate 3e-2 --ema_decay 0 --lora_rank 4 --per_device_train_batch_size 2
""".split()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A pipeline, prompts, a CLIP of random weights, and images with captions."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    build("sd3").save_pretrained(folder / "sd3")
    save_clip(folder / "clip")
    colours = ["red", "blue", "red", "green", "white", "black"]
    rows = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in colours],
        "text": [f"a {colour} square" for colour in colours],
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "squares.parquet")
    return folder


def squares(places):
    files = ["--data.data_files", places / "squares.parquet", "--data.caption_column", "text"]
    return ["--data.name", "parquet", *files]


def distill(places, output, *more):
    given = ["--teacher", places / "sd3", "--output_dir", places / output, *SMALL, *more]
    train_distill.main(list(map(str, given)))
    return places / output


def by_clip(places):
    prompts = ["--data.name", "text", "--data.data_files", places / "prompts.txt"]
    scored = ["--metric_for_best_model", "clip_score", "--evaluation.clip_model", places / "clip"]
    return [*prompts, *scored, "--evaluation.images_per_prompt", 2]


def lines(folder):
    found = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "run"} for line in found]


def kept(folder):
    return json.loads((folder / "best" / "evaluation.json").read_text())


def evaluated(places, role, *arguments):
    """The last row of what evaluate.py says."""
    output = places / "again.json"
    given = ["--output", output, "--clip_model", places / "clip", "--bootstrap_resamples", 0, *arguments]
    evaluate.main(list(map(str, given)))
    return [row for row in json.loads(output.read_text())["rows"] if row["generator"].startswith(role)][-1]


def test_by_a_score_of_prompts_alone(places):
    plain = distill(places, "plain", *by_clip(places))
    folder = distill(places, "scored", *by_clip(places), "--eval_metric_steps", 1)
    names = ("critic_loss", "generator_loss", "critic_grad_norm", "generator_grad_norm")
    assert metrics(folder, *names) == metrics(plain, *names)
    one, other = (load_file(path / "pytorch_lora_weights.safetensors") for path in (folder, plain))
    assert all(value.equal(other[name]) for name, value in one.items())

    found = lines(folder)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    scores = [line["clip_score"] for line in found]
    assert [line["best"] for line in found] == [score > max([0, *scores[:n]]) for n, score in enumerate(scores)]
    assert kept(folder)["clip_score"] == max(scores)
    assert "frechet_distance" not in kept(folder)

    best = folder / "best"
    given = ["--pipeline", best, "--prompts_file", places / "prompts.txt", "--images_per_prompt", 2]
    row = evaluated(places, "student", *given, "--metrics", "clip_score")
    assert row["CLIP score"] == pytest.approx(max(scores), rel=1e-6)
    picture = places / "fox.png"
    generate.main(["--pipeline", str(best), "--prompts", "a red fox", "--out", str(picture)])
    assert picture.stat().st_size > 0


def test_by_a_distance_to_captioned_images_and_a_resumed_run_goes_on_with_the_best_so_far(places):
    steps = ["--student_steps", 1, 2, "--objective", "realuid", "--eval_metric_steps", 1, "--save_steps", 2]
    given = [*squares(places), *steps, "--evaluation.batch_size", 4]
    whole = distill(places, "whole", *given)
    folder = distill(places, "parts", *given, "--max_steps", 3)
    # A kill between the two renames that replace best/, and a measurement past the checkpoint that is resumed from.
    (folder / "best").rename(folder / ".best.old")
    (folder / "checkpoints" / "step_00000003" / "manifest.json").unlink()
    distill(places, "parts", *given, "--resume_from_checkpoint", "latest")
    assert lines(folder) == lines(whole)
    assert kept(folder) == kept(whole)
    assert not list(folder.glob(".best*"))

    distances = [line["frechet_distance"] for line in lines(whole)]
    assert kept(whole)["frechet_distance"] == min(distances) < max(distances)
    row = evaluated(places, "student, 2", "--pipeline", whole / "best", *squares(places), "--metrics", "fid")
    assert row["Fréchet distance"] == pytest.approx(min(distances), rel=1e-6)


def test_whole_networks_on_a_cache_of_texts_and_another_file_of_prompts(places):
    cache = places / "cache"
    texts = ["--data.name", "text", "--data.data_files", places / "prompts.txt", "--text.max_length", 48]
    precompute_texts.main(
        list(map(str, ["--teacher", places / "sd3", *texts, "--texts_dir", cache, "--dtype", "float32"]))
    )
    scored = [*by_clip(places), "--eval_metric_steps", 2, "--max_steps", 2, "--data.name", cache]
    adapters = distill(places, "cached", *scored)
    assert kept(adapters)["how"]["prompts"]["prompts"] == len(PROMPTS)

    (places / "others.txt").write_text("\n".join(reversed(PROMPTS[:3])) + "\n")
    scored += ["--evaluation.prompts_file", places / "others.txt", "--evaluation.num_samples", 4, "--lora_rank", "null"]
    whole = distill(places, "networks", *scored)
    given = ["--prompts_file", places / "others.txt", "--num_samples", 4, "--images_per_prompt", 2]
    row = evaluated(places, "student", "--pipeline", whole / "best", *given, "--metrics", "clip_score")
    assert row["CLIP score"] == pytest.approx(kept(whole)["clip_score"], rel=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_teacher_of_captioned_images(places, rank):
    folder = places / f"teacher-{rank}"
    given = ["--model", f"{{pipeline: {places / 'sd3'}}}", *squares(places), "--output_dir", folder]
    given += "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2 --eval_metric_steps 1".split()
    given += "--text.height 8 --text.width 8".split()
    given += ["--evaluation.num_inference_steps", 3, *(["--lora_rank", rank] if rank else [])]
    train_teacher.main(list(map(str, given)))
    distances = [line["frechet_distance"] for line in lines(folder)]
    assert kept(folder)["frechet_distance"] == min(distances)
    if rank:
        assert (folder / "best" / "pytorch_lora_weights.safetensors").exists()
        return
    steps = ["--teacher_steps", 3, "--height", 8, "--width", 8]
    row = evaluated(places, "teacher", "--teacher", folder / "best", *steps, *squares(places), "--metrics", "fid")
    assert row["Fréchet distance"] == pytest.approx(min(distances), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--metric_for_best_model", "kid"], "`metric_for_best_model` is kid, which compares with real images"),
        (["--metric_for_best_model", "frechet_distance", *CAPTIONS], "no `evaluation.prompts_file`"),
        (["--evaluation.clip_model", "nowhere/clip"], "`evaluation.clip_model` 'nowhere/clip' cannot be loaded"),
        (["--evaluation.clip_model", "{places}/empty"], "the folder holds no weights"),
        (["--evaluation.reference", "{places}/none.npz"], "none.npz is no file"),
        (["--evaluation.prompts_file", "{places}/none.txt"], "`evaluation.prompts_file` .*none.txt is not a file"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run", "true"]], ids=["run", "dry run"])
def test_what_cannot_be_measured_is_a_sentence(places, changed, message, dry):
    (places / "empty").mkdir(exist_ok=True)
    shutil.copy(places / "clip" / "config.json", places / "empty")
    changed = [word.format(places=places) for word in changed]
    with pytest.raises(InputError, match=message):
        distill(places, "refused", *by_clip(places), "--eval_metric_steps", 1, *changed, *dry)
    assert not (places / "refused").exists()


def test_what_only_the_data_say_is_a_sentence_too(places):
    measured = ["--eval_metric_steps", 1, "--evaluation.num_samples", 7]
    with pytest.raises(InputError, match="`num_samples` is 7, but it counts images"):
        distill(places, "refused", *by_clip(places), *measured)
    with pytest.raises(InputError, match="which compares distributions, and 1 image is generated"):
        distill(places, "refused", *squares(places), "--data.max_train_samples", 1, *measured[:2])
    one = ["--data.max_train_samples", 1, "--evaluation.images_per_prompt", 2]
    with pytest.raises(InputError, match="has 1 image to compare with, and its covariance needs at least 2"):
        distill(places, "refused", *squares(places), *one, *measured[:2])
    with pytest.raises(InputError, match=r"`data\.image_size` is 16, but images of"):
        distill(places, "refused", *squares(places), "--data.image_size", 16, *measured[:2])
    alone = ["--data.name", "parquet", "--data.data_files", places / "prompts.parquet", "--data.caption_column", "text"]
    datasets.Dataset.from_dict({"text": PROMPTS}).to_parquet(places / "prompts.parquet")
    with pytest.raises(
        InputError, match="`metric_for_best_model` is frechet_distance, which compares with real images"
    ):
        distill(places, "refused", *alone, *measured[:2])
    assert not (places / "refused").exists()


def test_that_prompts_are_cut_is_said_once(places, caplog, capsys):
    (places / "long.txt").write_text("\n".join(["x" * 300] * 4) + "\n")
    logger = logging.getLogger(StableDiffusion3Pipeline.__module__)
    logger.addHandler(caplog.handler)
    measured = ["--data.data_files", places / "long.txt", "--eval_metric_steps", 1, "--max_steps", 1]
    folder = distill(places, "long", *by_clip(places), *measured)
    capsys.readouterr()
    given = ["--prompts_file", places / "long.txt", "--metrics", "clip_score"]
    evaluated(places, "student", "--pipeline", folder / "best", *given)
    logger.removeHandler(caplog.handler)
    assert "4 of 4 prompts are cut for `tokenizer`" in capsys.readouterr().err
    assert "truncated" not in caplog.text


def test_scores_of_prompts_are_not_for_runs_without(teacher_folder, tmp_path):
    given = ["--teacher", teacher_folder, "--output_dir", tmp_path / "run", "--eval_metric_steps", 1]
    for more, message in (
        (
            ["--metric_for_best_model", "clip_score"],
            "which is of images of prompts, and this run's pipeline takes none",
        ),
        (["--evaluation.images_per_prompt", 2], "`evaluation.images_per_prompt` is of images of prompts"),
    ):
        for dry in ([], ["--dry_run", "true"]):
            with pytest.raises(InputError, match=message):
                train_distill.main(list(map(str, [*given, *more, *dry])))
    assert not (tmp_path / "run").exists()
