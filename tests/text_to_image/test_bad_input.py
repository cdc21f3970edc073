"""What users get wrong around text-to-image runs: a sentence each, before anything is trained."""

import json
import shutil
import warnings

import pytest
import torch
from tiny_pipelines import build

from si_distill.commands import generate, train_distill
from si_distill.errors import InputError
from si_distill.settings import parse_settings
from si_distill.text_to_image.teacher import TextToImageTeacher, load_stock_pipeline, warn_of_distilled
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd3", "sd15", "sdxl"):
        build(kind).save_pretrained(folder / kind)
    return folder


def changed(saved, tmp_path, file, kind="sd3", **values):
    """A copy of a pipeline with other values in one of its JSON files."""
    shutil.copytree(saved / kind, folder := tmp_path / "teacher")
    written = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(written | values))
    return folder


def arguments(teacher, tmp_path, *more, prompts="a red fox\ntwo boats\n"):
    if not (file := tmp_path / "prompts.txt").exists():
        file.write_text(prompts)
    given = {"teacher": teacher, "output_dir": tmp_path / "run", "data.name": "text", "data.data_files": file}
    given |= {"text.height": 16, "text.width": 16, "max_steps": 1, "per_device_train_batch_size": 1, "ema_decay": 0}
    return [*(str(word) for name, value in given.items() for word in (f"--{name}", value)), *more]


def distill(teacher, tmp_path, *more, **prompts):
    train_distill.main(arguments(teacher, tmp_path, "--lora_rank", "2", *more, **prompts))


@pytest.mark.parametrize(
    ("file", "kind", "values", "message"),
    [
        ("model_index.json", "sd3", {"_class_name": "PixArtSigmaPipeline"}, "none of the text-to"),
        ("vae/config.json", "sd3", {"layers_per_block": 3}, "The vae of .* lacks .* tensors"),
        (
            "transformer/config.json",
            "sd3",
            {"num_layers": "x"},
            "Cannot load the StableDiffusion3",
        ),
        (
            "model_index.json",
            "sd3",
            {"scheduler": ["diffusers", "DDPMScheduler"]},
            "flow matching",
        ),
        (
            "model_index.json",
            "sd15",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "flow matching",
        ),
    ],
)
def test_teachers_that_cannot_be_used_are_refused(saved, tmp_path, file, kind, values, message):
    with pytest.raises(InputError, match=message):
        load_stock_pipeline(str(changed(saved, tmp_path, file, kind, **values)))


def test_a_pipeline_that_was_saved_without_an_encoder_is_told_from_one_that_needs_none(saved, tmp_path):
    nothing = [None, None]
    folder = str(changed(saved, tmp_path, "model_index.json", text_encoder=nothing, text_encoder_3=nothing))
    with pytest.raises(
        InputError, match=r"'.*teacher' was saved without its text_encoder and text_encoder_3: give one"
    ):
        load_stock_pipeline(folder)
    with pytest.raises(InputError, match="was saved without its text_encoder: give one"):
        load_stock_pipeline(str(changed(saved, tmp_path / "xl", "model_index.json", "sdxl", text_encoder=nothing)))
    # Of a run on a cache of texts, encoders are left out.
    without = load_stock_pipeline(folder, text_encoder=None, text_encoder_2=None, text_encoder_3=None)
    assert without.text_encoder is without.text_encoder_3 is None


@pytest.mark.parametrize("part", ["vae", "transformer", "tokenizer_2"])
@pytest.mark.parametrize("entry", [None, [None, None], "Anything"])
def test_an_index_without_a_component_is_refused_by_a_dry_run_too(saved, tmp_path, part, entry):
    folder = str(changed(saved, tmp_path, "model_index.json", **{part: entry}))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    common = ["--output_dir", str(tmp_path / "run"), "--data.data_files", str(tmp_path / "prompts.txt")]
    student = parse_settings(DistillConfig, ["--teacher", folder, "--data.name", "text", *common])
    captions = ["--data.name", "parquet", "--data.caption_column", "text"]
    teacher = parse_settings(TeacherConfig, ["--model", json.dumps({"pipeline": folder}), *captions, *common])
    for refuse in (lambda: load_stock_pipeline(folder), lambda: dry_run(student), lambda: dry_run(teacher)):
        with pytest.raises(InputError, match=f"was saved without its {part}: give one"):
            refuse()


def test_a_precision_is_asked_for_without_a_warning(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert load_stock_pipeline(str(saved / "sd3"), torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_folder_that_is_not_there_and_an_adapter_are_no_teachers(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        distill(tmp_path / "nowhere", tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/student.json").write_text("{}")
    with pytest.raises(InputError, match="give the base that its"):
        distill(tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_targets", "to_q", "nothing"], "`lora_targets` 'nothing': no linear layer"),
        (["--lora_targets", "to_q|to_k"], "no linear layer"),
        (["--critic_start", "random"], "`critic_start` is 'random', which is for teachers of classes"),
        (["--student_guidance_scale", "2"], "`student_guidance_scale` is 2.0, which is for teachers of classes"),
        (["--text.height", "18"], "sides are multiples of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(saved, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        distill(saved / "sd3", tmp_path, *more)


def test_a_dry_run_refuses_steps_that_no_stock_call_takes(saved, tmp_path):
    steps = ["--student_steps", "4", "--dry_run", "true"]
    with pytest.raises(InputError, match="needs init_time 1"):
        distill(saved / "sd15", tmp_path, *steps)
    distill(saved / "sd15", tmp_path, *steps, "--init_time", "1")


@pytest.mark.parametrize(("prompts", "message"), [("", "it has no rows"), ("a\n\nb\n", "Prompt 2 of 3 is empty")])
def test_empty_prompts_are_refused_by_every_script_alike(saved, tmp_path, prompts, message):
    teacher = saved / "sd3"
    with pytest.raises(InputError, match=message):
        distill(teacher, tmp_path, prompts=prompts)
    words = ["--pipeline", teacher, "--prompts_file", tmp_path / "prompts.txt", "--out", tmp_path / "out.png"]
    with pytest.raises(InputError, match=message):
        generate.main([str(word) for word in words])


def test_a_network_with_an_adapter_is_no_base(saved):
    pipeline = load_stock_pipeline(str(saved / "sd3"))
    TextToImageTeacher(pipeline, (16, 16), 2).transformer.adapters.add()
    with pytest.raises(InputError, match="has an adapter already"):
        TextToImageTeacher(pipeline, (16, 16), 2)


def test_distilled_teachers_are_told_of(saved, capsys):
    pipeline = load_stock_pipeline(str(saved / "sd3"))
    warn_of_distilled("user/hyperreal-dancer-12step", pipeline, [4.5])
    assert "note:" not in capsys.readouterr().err
    for name in ("user/sd3-turbo", "runs/sdxl-lightning-4step/"):
        warn_of_distilled(name, pipeline, [1.0])
        assert "distilled to a few steps already" in capsys.readouterr().err
    flux = build("flux")
    warn_of_distilled("user/flux", flux, [3.0, 1.0])
    assert "guidance scales other than 1 (3, 1)" in capsys.readouterr().err
    flux.transformer.register_to_config(guidance_embeds=False)
    warn_of_distilled("user/flux", flux, [3.0])
    assert "like FLUX.1-schnell" in capsys.readouterr().err


def test_a_run_notices_other_prompts_and_leaves_nothing_of_whole_pipelines(saved, tmp_path):
    teacher = saved / "sd3"
    train_distill.main(arguments(teacher, tmp_path))
    assert (tmp_path / "run/transformer/diffusion_pytorch_model.safetensors").is_file()
    distill(teacher, tmp_path, "--overwrite_output_dir", "true")
    assert [path.name for path in (tmp_path / "run").glob("*/*.safetensors")] == []
    (tmp_path / "prompts.txt").write_text("two boats\na red fox\n")
    with pytest.raises(InputError, match="The texts of this run's data are not those"):
        distill(teacher, tmp_path, "--resume_from_checkpoint", "latest", "--max_steps", "2")
