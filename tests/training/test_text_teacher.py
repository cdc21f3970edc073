"""Text-to-image pipelines of diffusers in training: what is learned, what comes out, what is refused."""

import io
import json
import shutil
import sys

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, metrics, run
from test_distributed import training as of_ranks
from tiny_pipelines import build

from si_distill.errors import InputError
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.dry_run.report import dry_run
from si_distill.training.text_teacher import TextTeacherTrainer
from si_distill.units import binary_size

SMALL = "--per_device_train_batch_size 4 --logging_steps 1 --eval_steps 1000 --save_steps 1000".split()
CAPTIONS = ["a red square", "a green square", "a blue square"]


def captioned(folder, size):
    """Images of one colour each, with captions; the settings of the data."""
    rows = {"image": [], "text": []}
    for n in range(12):
        colour = np.zeros((size, size, 3), np.uint8)
        colour[..., n % 3] = 200 + n
        buffer = io.BytesIO()
        Image.fromarray(colour).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(CAPTIONS[n % 3])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(str(folder / "images.parquet"))
    return ["--data.name", "parquet", "--data.data_files", folder / "images.parquet", "--data.image_size", size,
            "--data.caption_column", "text"]  # fmt: skip


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    """A folder with a tiny SanaPipeline and captioned images, and the settings that name both."""
    folder = tmp_path_factory.mktemp("sana")
    build("sana").save_pretrained(folder / "pipeline")
    return ["--model", f"{{pipeline: {folder / 'pipeline'}}}", *captioned(folder, 32)]


def training(folder, *arguments) -> TextTeacherTrainer:
    argv = ["--output_dir", folder, *SMALL, *arguments]
    return TextTeacherTrainer(parse_settings(TeacherConfig, list(map(str, argv))))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["sana", "lumina2", "sd15"])
def test_a_pipeline_learns_captioned_images(tmp_path, name):
    build(name).save_pretrained(tmp_path / "pipeline")
    size = 32
    model = ["--model", f"{{pipeline: {tmp_path / 'pipeline'}}}"]
    trainer = training(tmp_path / "run", *model, *captioned(tmp_path, size), "--learning_rate", 1e-2)
    losses = []
    for _ in range(15):
        metrics, applied = trainer.iteration()
        trainer.step += 1
        losses.append(metrics["loss"].item())
        assert applied
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_run_folder_is_the_stock_pipeline_with_the_average(sana, tmp_path):
    trainer = training(tmp_path / "run", *sana, "--max_steps", 3)
    trainer.train()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline).__name__ == "SanaPipeline"
    average = dict(trainer.averages.network.base.named_parameters())
    assert same(weights(tmp_path / "run"), {name: p.detach() for name, p in average.items()})
    assert not same(weights(tmp_path / "run"), dict(build("sana").transformer.named_parameters()))
    image = pipeline(
        CAPTIONS[0], num_inference_steps=2, height=32, width=32, use_resolution_binning=False, output_type="np"
    ).images
    assert np.isfinite(image).all()
    assert (tmp_path / "run" / "samples" / "step_00000003.png").exists()
    assert not (tmp_path / "run" / "README.md").exists()  # a card would tell of a pipeline of this package
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["network"]["class"] == "SanaTransformer2DModel"
    assert (facts["data"]["images"], facts["data"]["captions"]) == (12, 3)


def test_an_adapter_is_what_the_stock_pipeline_loads(sana, tmp_path):
    lora = [*sana, "--lora_rank", 2, "--learning_rate", 1e-2]
    trainer = training(tmp_path / "run", *lora, "--max_steps", 3)
    trainer.train()
    training(tmp_path / "parts", *lora, "--max_steps", 1).train()
    training(tmp_path / "parts", *lora, "--max_steps", 3, "--resume_from_checkpoint", "latest").train()
    whole, parts = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "parts"))
    assert same(whole, parts)
    assert not (tmp_path / "run" / "model_index.json").exists()

    pipeline, t = build("sana"), torch.tensor([700.0])
    told = trainer.texts.condition(torch.arange(1)).text
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = pipeline.transformer(x_t, timestep=t, return_dict=False, **told)[0]
        pipeline.load_lora_weights(tmp_path / "run")
        after = pipeline.transformer(x_t, timestep=t, return_dict=False, **told)[0]
        (ours,) = trainer.averages.network(x_t, t, **told)
    assert not torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(after, ours, atol=1e-5)


def test_a_resumed_run_repeats_the_uninterrupted_one(sana, tmp_path):
    training(tmp_path / "whole", *sana, "--max_steps", 4).train()
    training(tmp_path / "parts", *sana, "--max_steps", 2).train()
    training(tmp_path / "parts", *sana, "--max_steps", 4, "--resume_from_checkpoint", "latest").train()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_two_processes_train_as_one(sana, tmp_path):
    wide = [*sana, "--max_steps", 3, "--adam_epsilon", 1e-3, "--text.height", 32, "--text.width", 64]
    wide = [*wide, "--data.image_size", 8]
    ways = {"whole": wide, "adapter": [*wide, "--lora_rank", 2, "--learning_rate", 1e-2]}
    entries = []
    for way, given in ways.items():
        training(tmp_path / way, *given).train()
        for kind, sharded in (("ddp", False), ("fsdp", True)):
            cut = ["--output_dir", tmp_path / f"{way}-{kind}", *SMALL, "--per_device_train_batch_size", 2]
            entries.append(of_ranks("train_teacher", [*cut, *given], sharded, None))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"ranks": 2, "copies": [], "trainings": entries}]))
    run(sys.executable, ROOT / "tests/training/ranks.py", plan)
    assert json.loads((tmp_path / "0.codes").read_text()) == [0, 0], (tmp_path / "0.0.log").read_text()
    assert json.loads((tmp_path / "0.0.errors").read_text()) == [None] * 3
    for way, found in (("whole", weights), ("adapter", adapter)):
        for kind in ("ddp", "fsdp"):
            one, two = (np.array(metrics(tmp_path / name, "loss", "grad_norm")) for name in (way, f"{way}-{kind}"))
            assert two == pytest.approx(one, rel=1e-4)
            expected, given = found(tmp_path / way), found(tmp_path / f"{way}-{kind}")
            assert given.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(given[name], tensor, rtol=0, atol=2e-5)


def test_images_of_any_height_and_width(sana, tmp_path):
    size = ["--data.image_size", 8, "--text.height", 64, "--text.width", 32]
    trainer = training(tmp_path / "run", *sana, *size)
    batch = trainer.next_batch(trainer.data, 0)
    assert batch["images"].shape == (4, 3, 64, 32)
    assert trainer.samples(batch).shape == (4, *trainer.teacher.latent_shape) == (4, 4, 32, 16)
    assert trainer.iteration()[1]
    assert trainer.facts()["data"]["size"] == [64, 32]


def test_a_sample_grid_compiles_nothing(sana, tmp_path):
    """The averages are adapters on the compiled base: each batch of the grid would be compiled for its own sake."""
    trainer = training(tmp_path / "run", *sana, "--lora_rank", 2, "--compile", "true")
    before = dict(torch._dynamo.utils.counters["frames"])
    (tmp_path / "run" / "samples").mkdir(parents=True)
    trainer.outputs.samples(0)
    assert (tmp_path / "run" / "samples" / "step_00000000.png").exists()
    assert dict(torch._dynamo.utils.counters["frames"]) == before


@pytest.mark.parametrize("rank", [None, 2])
def test_a_dry_run_reads_configs_alone(sana, tmp_path, rank):
    lora = [] if rank is None else ["--lora_rank", rank]
    trainer = training(tmp_path / "run", *sana, *lora)
    name = trainer.settings.model["pipeline"]
    shutil.copytree(name, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    argv = ["--output_dir", tmp_path / "dry", *SMALL, *sana, *lora, "--model.pipeline", tmp_path / "configs"]
    report = dry_run(parse_settings(TeacherConfig, list(map(str, argv))))
    assert not (tmp_path / "dry").exists()
    trained = sum(p.numel() for p in trainer.trained.parameters)
    base = sum(p.numel() for n, p in trainer.teacher.transformer.base.named_parameters() if ".lora_" not in n)
    assert f"SanaTransformer2DModel, {base:,} parameters, 4 × 16 × 16, text" in report
    assert f"trained parameters {binary_size(4 * trained)}, gradients {binary_size(4 * trained)}" in report
    assert f"Adam's moments {binary_size(8 * trained)}, moving averages (1) {binary_size(4 * trained)}" in report
    assert (f"teacher {binary_size(4 * base)}" in report) == (rank is not None)
    assert "32 × 32 pixels" in report


def test_the_empty_text_takes_the_place_of_some_captions(sana, tmp_path):
    trainer = training(tmp_path / "run", *sana, "--caption_dropout_prob", 0.5, "--per_device_train_batch_size", 64)
    seen = []
    trainer.trained.module.register_forward_pre_hook(lambda module, args, told: seen.append(told), with_kwargs=True)
    trainer.iteration()
    null, mask = trainer.texts.null.text, seen[0]["encoder_attention_mask"]
    empty = (mask == null["encoder_attention_mask"]).all(1)
    assert 20 <= empty.sum() <= 44
    assert torch.equal(
        seen[0]["encoder_hidden_states"][empty], null["encoder_hidden_states"].expand(int(empty.sum()), -1, -1)
    )


def test_a_byte_order_mark_is_no_part_of_a_caption(sana, tmp_path):
    rows = {"image": [Image.new("RGB", (32, 32))], "text": ["\ufeffa cat"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "marked.parquet")
    trainer = training(tmp_path / "run", *sana, "--data.data_files", tmp_path / "marked.parquet")
    assert trainer.texts.prompts == ["a cat"]


def test_the_target_is_the_velocity_of_the_pipelines_own_path(sana, tmp_path):
    """A network that knew x0 and x1 would have no loss: the sign and the times are those of the stock pipeline."""
    trainer = training(tmp_path / "run", *sana, "--caption_dropout_prob", 0)
    batch = {}
    encode = trainer.samples
    trainer.samples = lambda given: batch.setdefault("x0", encode(given))
    noise = trainer.noise.uniform_and_normal

    def drawn(*arguments, **told):
        batch["u"], batch["x1"] = noise(*arguments, **told)
        return batch["u"], batch["x1"]

    trainer.noise.uniform_and_normal = drawn

    def exact(module, args, told, output):
        t = batch["u"].view(-1, 1, 1, 1)
        assert torch.allclose(args[0], (1 - t) * batch["x0"] + t * batch["x1"], atol=1e-6)
        assert torch.allclose(args[1], 1000 * batch["u"])  # what Sana is given
        return (output[0] * 0 + batch["x1"] - batch["x0"],)

    trainer.trained.module.register_forward_hook(exact, with_kwargs=True)
    metrics, _ = trainer.iteration()
    assert metrics["loss"].item() == pytest.approx(0, abs=1e-10)


def test_latents_of_the_pipelines_autoencoder_give_the_same_update(tmp_path):
    from si_distill.data.latents.config import LatentsConfig
    from si_distill.data.latents.encoding import precompute_latents

    pipeline = build("lumina2")
    pipeline.vae.encoder.conv_out.weight[4:] = 0  # the latents' variance: none
    pipeline.vae.encoder.conv_out.bias[4:] = -30
    pipeline.save_pretrained(tmp_path / "pipeline")
    data = captioned(tmp_path, 32)
    vae = ["--vae", tmp_path / "pipeline" / "vae", "--dtype", "float32", "--output_dir", tmp_path / "latents"]
    precompute_latents(parse_settings(LatentsConfig, list(map(str, [*vae, *data]))))
    model = ["--model", f"{{pipeline: {tmp_path / 'pipeline'}}}"]
    cached = ["--data.name", tmp_path / "latents", "--data.image_size", 32, "--data.caption_column", "text"]
    losses = [
        training(tmp_path / name, *model, *given).iteration()[0]["loss"].item()
        for name, given in (("images", data), ("cache", cached))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interpolant", "vp"], "`interpolant` is 'vp', which cannot be set with `model.pipeline`"),
        (["--prediction_type", "epsilon"], "`prediction_type`"),
        (["--model.patch_size", "2"], "leave `model.patch_size` out"),
        (["--data.caption_column", "null"], "set `data.caption_column`"),
        (["--data.degradation", "downsample", "--data.degradation_kwargs", "{factor: 2}"], "no references"),
        (["--data.image_size", "33"], "multiples of"),
        (
            ["--data.image_size", "8"],
            "`height` and `width` are 16 and 16",
        ),  # the pipeline's own, of which it makes none
        (["--text.height", "32", "--text.width", "64"], "`data.image_size` is 32, but images of 32 × 64 pixels"),
        (["--text.negative_prompt", "blurry"], "which is for distillation"),
        (["--caption_dropout_prob", "1"], r"\[0, 1\)"),
        (["--lora_rank", "0"], "lora_rank"),
        (["--lora_targets", "[to_q]"], "without a `lora_rank`"),
        (["--model.pipeline", "nowhere"], "give one of the text-to-image pipelines known here"),
    ],
)
def test_what_cannot_work_is_refused(sana, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        training(tmp_path / "run", *sana, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argument",
    [["--lora_rank", "4"], ["--text.max_length", "8"], ["--data.caption_column", "text"]],
)
def test_settings_of_pipelines_are_refused_without_one(tmp_path, argument):
    with pytest.raises(InputError, match=r"give `model\.pipeline`"):
        parse_settings(TeacherConfig, ["--output_dir", str(tmp_path), *argument])
