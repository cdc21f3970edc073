"""Text-to-image students, teachers and finished images of the same prompts: figures, how they are said, what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from script_runs import command, run
from tiny_pipelines import build, save_clip
from transformers import CLIPModel, CLIPProcessor

from si_distill.data import DataConfig
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.evaluation.formulas import mean_interval, prompt_distances
from si_distill.evaluation.metrics import METRICS, register_metric
from si_distill.evaluation.report import evaluate
from si_distill.evaluation.scores import ClipScorer, clip_score, pick_score
from si_distill.evaluation.table import format_table
from si_distill.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from si_distill.text_to_image.config import TextConfig
from si_distill.text_to_image.student import TextToImageStudent
from si_distill.text_to_image.teacher import TextToImageTeacher

PROMPTS = ["a red fox in the snow", "two boats", "nine"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, a student of 1 and 2 steps as its adapter, both of 8×8 pixels, prompts, and a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("text")
    pipeline = build("sd3")
    pipeline.save_pretrained(folder / "teacher")
    teacher = TextToImageTeacher(pipeline, (8, 8), lora_rank=2)
    scheduler = StochasticInterpolantScheduler.from_config(
        teacher.scheduler.config, solver="ddim", student_steps=[1, 2]
    )
    network = build_adapter(teacher)
    TextToImageStudent(teacher, network, scheduler, str(folder / "teacher"), TextConfig()).save_pretrained(
        folder / "student"
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    save_clip(folder / "clip")
    return folder


def build_adapter(teacher):
    network, generator = copy.deepcopy(teacher.transformer), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def settings_of(folders, tmp_path, **settings) -> dict:
    given = dict(
        pipeline=str(folders / "student"),
        prompts_file=str(folders / "prompts.txt"),
        images_per_prompt=2,
        clip_model=str(folders / "clip"),
        pick_model=str(folders / "clip"),
        metrics=["clip_score", "pick_score", "diversity"],
        output=str(tmp_path / "e.json"),
        cache_dir=str(tmp_path / "cache"),
    )
    return {**given, **settings}


def test_a_student_and_its_teacher_are_measured_by_prompts_alone(folders, tmp_path):
    given = settings_of(folders, tmp_path, teacher=str(folders / "teacher"), teacher_steps=[1, 3], guidance_scale=4.5)
    result = evaluate(EvaluationConfig(**given, save_npz=True))
    assert json.loads((tmp_path / "e.json").read_text()) == result
    rows = {row["generator"]: row for row in result["rows"]}
    assert list(rows) == ["teacher, 1 step", "teacher, 3 steps", "student, 1 step", "student, 2 steps"]
    # Guidance is a second row of each evaluation; a student has none.
    assert [row["network evaluations"] for row in rows.values()] == [2, 6, 1, 2]
    assert result["reference"] is None
    assert result["num_samples"] == 6
    assert result["prompts"]["prompts"] == 3
    assert result["prompts"]["images_per_prompt"] == 2
    made = rows["teacher, 3 steps"]["made"]
    assert (made["class"], made["solver"], made["guidance_scale"]) == (
        "StableDiffusion3Pipeline",
        "FlowMatchEulerDiscreteScheduler",
        4.5,
    )
    assert (made["height"], made["width"], made["dtype"]) == (8, 8, "float32")

    for name, row in rows.items():
        images = np.load(tmp_path / f"e_{name.replace(', ', '_').replace(' ', '_')}.npz")["arr_0"]
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        texts = [text for text in PROMPTS for _ in range(2)]
        scores = clip_score(str(folders / "clip"), torch.device("cpu"))(images, texts)
        assert row["CLIP score"] == pytest.approx(scores.mean(), rel=1e-6)
        flat = torch.nn.functional.normalize(images.flatten(1).double() / 127.5 - 1, dim=1)
        apart = [1 - float(flat[i] @ flat[i + 1]) for i in (0, 2, 4)]
        assert row["diversity per prompt"] == pytest.approx(np.mean(apart), rel=1e-9)
        assert row["intervals"]["diversity per prompt"] == pytest.approx(mean_interval(np.array(apart)))
        assert row["saturation"] == pytest.approx(float(((images == 0) | (images == 255)).double().mean()))
        assert row["Fréchet distance"] is None
    assert rows["student, 1 step"]["PickScore"] != rows["student, 2 steps"]["PickScore"]

    table = (tmp_path / "e.md").read_text()
    assert table == format_table(result) + "\n"
    assert "| CLIP score | PickScore | saturation | diversity per prompt |" in table
    assert "3 prompts of prompts.txt" in table
    assert result["scorers"]["CLIP score"]["weights"] in table
    with Picture.open(tmp_path / "e.png") as picture:
        assert picture.height > 4 * 48  # a row of each generator


def test_batches_processes_and_further_images_change_no_image(folders, tmp_path):
    def images(**settings):
        given = dict(pipeline=str(folders / "student"), prompts_file=str(folders / "prompts.txt"), metrics=["isc"])
        evaluate(EvaluationConfig(**{**given, **settings}, output=str(tmp_path / "e.json"), save_npz=True))
        with np.load(tmp_path / "e_student_2_steps.npz") as file:
            return file["arr_0"].astype(int)

    single = images(batch_size=3)
    assert np.abs(images(batch_size=2) - single).max() <= 1
    double = images(images_per_prompt=2)
    assert np.abs(double[::2] - single).max() <= 1  # the first of each prompt
    assert np.abs(double[1::2] - single).max() > 8
    assert np.abs(images(seed=1) - single).max() > 8

    given = settings_of(folders, tmp_path, metrics=["clip_score"], output=str(tmp_path / "two.json"), save_npz=True)
    words = [word for key, value in given.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    done = run(*command("evaluate.py", *words, "--batch_size", 1, processes=2))
    assert "clip score" in done.stdout.lower()
    with np.load(tmp_path / "two_student_2_steps.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - double).max() <= 1


@pytest.fixture
def captioned(folders, tmp_path):
    """16 captioned images of 8×8 pixels in a Parquet file."""
    rng = np.random.default_rng(0)
    rows = [
        dict(image=Picture.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), text=f"number {n}")
        for n in range(16)
    ]
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "captioned.parquet")
    return DataConfig(
        name="parquet", data_files=str(tmp_path / "captioned.parquet"), caption_column="text", image_size=8
    )


def test_captioned_images_are_prompts_and_reference(folders, tmp_path, captioned):
    given = settings_of(folders, tmp_path, prompts_file=None, images_per_prompt=1, metrics=["fid", "kid", "clip_score"])
    result = evaluate(EvaluationConfig(**given, data=captioned, kid_subsets=2, bootstrap_resamples=2))
    assert result["reference"]["images"] == result["prompts"]["prompts"] == 16
    *students, floor = result["rows"]
    assert floor["generator"] == "real half against real half"
    assert "CLIP score" not in floor
    assert all(row["Fréchet distance"] > 0 and row["KID"] is not None and row["CLIP score"] >= 0 for row in students)
    assert (tmp_path / "e_neighbours.png").exists()
    assert (tmp_path / "e_quality.png").exists()

    # The real images themselves, as finished ones, in the order of their captions.
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, row in enumerate(Dataset.from_parquet(captioned.data_files)):
        row["image"].save(pictures / f"{n:02d}.png")
    given |= dict(pipeline=None, images=str(pictures), output=str(tmp_path / "files.json"))
    images, _ = evaluate(EvaluationConfig(**given, data=captioned, bootstrap_resamples=0))["rows"]
    assert images["Fréchet distance"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(InputError, match="16 images, and 8"):
        evaluate(EvaluationConfig(**given, data=captioned, num_samples=8))


def test_a_registered_metric_gets_images_and_prompts(folders, tmp_path):
    class Lengths:
        identity = {"figure": "characters and channels"}

        def __call__(self, images, prompts):
            return np.array([float(len(prompt) + images.shape[1]) for prompt in prompts])

    @register_metric("mean length", of_prompts=True, scorer=lambda settings, device: Lengths())
    def mean_length(comparison):
        assert list(comparison.prompts) == [text for text in PROMPTS for _ in range(2)]
        return float(comparison.compared["mean length"].mean())

    try:
        result = evaluate(EvaluationConfig(**settings_of(folders, tmp_path, metrics=["diversity"])))
    finally:
        del METRICS["mean length"]
    assert {row["mean length"] for row in result["rows"]} == {sum(map(len, PROMPTS)) / 3 + 3}
    assert result["scorers"]["mean length"] == Lengths.identity
    assert result["rows"][0]["CLIP score"] is None  # not asked for


def test_scores_are_scaled_cosines_of_the_models_own_embeddings(folders):
    name, device = str(folders / "clip"), torch.device("cpu")
    images = torch.randint(0, 256, (4, 3, 24, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["fox", "a longer text than the others " * 9, "two boats", "fox"]
    model, processor = CLIPModel.from_pretrained(name).requires_grad_(False), CLIPProcessor.from_pretrained(name)
    cosines = []
    for image, text in zip(images, texts, strict=True):
        picture = Picture.fromarray(image.permute(1, 2, 0).numpy())
        inputs = processor(text=[text], images=[picture], return_tensors="pt", truncation=True, max_length=77)
        cosines.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    cosines = np.array(cosines)
    assert cosines.min() < 0 < cosines.max()
    assert clip_score(name, device)(images, texts) == pytest.approx(100 * cosines.clip(0), abs=1e-3)
    own = float(model.logit_scale.exp())
    assert pick_score(name, device)(images, texts) == pytest.approx(own * cosines, abs=1e-3)
    one_by_one = [pick_score(name, device)(images[i : i + 1], texts[i : i + 1])[0] for i in range(4)]
    assert one_by_one == pytest.approx(pick_score(name, device)(images, texts), abs=1e-4)


def test_a_processor_is_lent_to_a_model_without_one(folders, tmp_path):
    name, device = str(tmp_path / "bare"), torch.device("cpu")
    CLIPModel.from_pretrained(folders / "clip").save_pretrained(name)
    images = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    lent = ClipScorer("pick_model", name, device, processor=str(folders / "clip"))
    assert lent(images, ["fox"]) == pytest.approx(pick_score(str(folders / "clip"), device)(images, ["fox"]))
    with pytest.raises(InputError, match=r"`clip_model` .* cannot be loaded.*choose another metric"):
        clip_score(name, device)


def test_diversity_is_the_mean_distance_of_pairs():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = [np.mean([1 - float(unit[a] @ unit[b]) for a, b in pairs]) for pairs in (
        [(0, 1), (0, 2), (1, 2)], [(3, 4), (3, 5), (4, 5)])]  # fmt: skip
    assert prompt_distances(features, 3) == pytest.approx(expected)
    assert prompt_distances(features[[0, 0, 1, 1]], 2) == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (dict(prompts_file=None), "makes images of prompts, and there are none"),
        (dict(prompts_file="none.txt"), "none.txt is not a file"),
        (dict(clip_model="runs/none"), "`clip_model` 'runs/none' cannot be loaded"),
        (dict(pick_model="{folders}/teacher/text_encoder"), "it is of the type clip_text_model, not clip"),
        (dict(num_samples=5), "a multiple of 2 up to 6"),
        (dict(num_samples=8), "a multiple of 2 up to 6"),
        (
            dict(metrics=["clip_score", "fid"]),
            "`metrics` holds fid, which compares with real images, and there are none",
        ),
        (dict(solver=["heun"]), "`solver` is set"),
        (dict(height=24, width=24, teacher="{folders}/student"), "a student's adapter and no pipeline"),
        (dict(height=17, width=17), "multiples of"),
        (dict(height=96, width=96), "The row `student, 1 step` cannot be made.*pos_embed_max_size"),
        (dict(height=16), "give both"),
        (dict(images_per_prompt=1), "--images_per_prompt 2"),
        (dict(pipeline="{folders}/teacher"), "student.json"),
    ],
)
def test_what_does_not_fit_is_a_sentence(folders, tmp_path, changed, text):
    changed = {k: v.format(folders=folders) if isinstance(v, str) else v for k, v in changed.items()}
    with pytest.raises(InputError, match=text):
        evaluate(EvaluationConfig(**settings_of(folders, tmp_path, **changed)))
    assert not (tmp_path / "e.json").exists()


def test_metrics_of_prompts_need_prompts(tmp_path):
    with pytest.raises(InputError, match="clip_score, which is of images of prompts"):
        evaluate(EvaluationConfig(images="samples.npz", metrics=["clip_score"], output=str(tmp_path / "e.json")))
    with pytest.raises(InputError, match="`images_per_prompt` is of images of prompts"):
        evaluate(EvaluationConfig(images="samples.npz", images_per_prompt=2, output=str(tmp_path / "e.json")))
