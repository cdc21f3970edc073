"""`training/convert_teacher.py`: files that cannot be read, what is written, and what comes of it."""

import json
import os
import resource
import runpy
import sys
import zipfile

import pytest
import torch
from conversion_runs import convert, convert_source
from diffusers import AutoencoderKL
from diffusers_models import save_dit_pipeline
from foreign_sit import HEADS, sit_weights
from foreign_unet import HEADS as UNET_HEADS
from foreign_unet import unet_weights
from PIL import Image
from safetensors.torch import save_file
from script_runs import ROOT, run
from trainer_builders import distillation

from si_distill import InterpolantPipeline
from si_distill.conversion.checkpoints import read_checkpoint
from si_distill.errors import InputError

SCRIPT = ROOT / "training" / "convert_teacher.py"
SIT = ("--num_attention_heads", HEADS)
UNET = ("--num_attention_heads", UNET_HEADS, "--sample_size", 8)


def contents(folder):
    """Path and bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestReading:
    @pytest.mark.parametrize("kept", [0, 10, 1000, -30])
    def test_a_truncated_file(self, tmp_path, kept):
        file = tmp_path / "checkpoint.pt"
        torch.save(sit_weights(), file)
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(
            InputError, match=rf"cannot be read as a PyTorch checkpoint .*has {file.stat().st_size} bytes"
        ):
            read_checkpoint(file)

    def test_a_file_of_the_format_before_zip(self, tmp_path):
        file = tmp_path / "checkpoint.pt"
        torch.save(sit_weights(), file, _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(file)
        assert read_checkpoint(file).keys() == sit_weights().keys()
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(InputError, match="cannot be read as a PyTorch checkpoint"):
            read_checkpoint(file)

    def test_safetensors(self, tmp_path):
        file = tmp_path / "checkpoint.safetensors"
        save_file(sit_weights(), file)
        assert read_checkpoint(file).keys() == sit_weights().keys()
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(InputError, match="Cannot read"):
            read_checkpoint(file)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_hostile_file_does_not_run(self, tmp_path, zipped):
        trace = tmp_path / "trace"

        class Hostile:
            def __reduce__(self):
                return os.system, (f"touch {trace}",)

        file = tmp_path / "checkpoint.pt"
        torch.save({"ema": sit_weights(), "args": Hostile()}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"holds more than tensors: loading it would call (posix|nt|os)\.system"):
            read_checkpoint(file)
        assert not trace.exists()

    def test_text_and_other_things(self, tmp_path):
        file = tmp_path / "checkpoint.pt"
        file.write_text("<html>Not found</html>")
        with pytest.raises(InputError, match="cannot be read as a PyTorch checkpoint"):
            read_checkpoint(file)
        torch.save([torch.ones(2)], file)
        with pytest.raises(InputError, match="holds a list, not the dictionary of a checkpoint"):
            read_checkpoint(file)
        with pytest.raises(InputError, match="There is no checkpoint file"):
            read_checkpoint(tmp_path / "other.pt")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"conv.weight": torch.ones(2)}, "of no known kind: its tensors are named conv.weight"),
            ({"ema": {"step": 3}}, "'ema' is no state dictionary.*begins with step"),
            ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "of no known kind: its tensors are named a"),
            ({}, "is no state dictionary"),
        ],
    )
    def test_a_checkpoint_of_something_else(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message):
            convert(tmp_path, content)


class TestWriting:
    def test_by_the_real_script(self, tmp_path):
        source, out = tmp_path / "sit.pt", tmp_path / "out"
        torch.save(sit_weights(), source)
        arguments = (sys.executable, SCRIPT, "--source", source, "--out", out)

        refused = run(*arguments, check=False)
        assert refused.returncode == 2
        assert "error: 2 blocks of width 24 are no published size" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not out.exists()

        done = run(*arguments, *SIT)
        for said in (
            "SiT teacher",
            "4 × 8 × 8, 5 classes and a null class",
            "linear, prediction velocity",
            "data at t = 1, as the network was trained",
        ):
            assert said in done.stdout
        assert "the network works on latents: add --vae" in done.stdout
        files = contents(out)
        assert {"model_index.json", "pipeline.py", "transformer/diffusion_pytorch_model.safetensors"} <= files.keys()
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "sit.pt"]

    def test_over_another_folder_only_when_told_to(self, tmp_path):
        out = convert(tmp_path, sit_weights(seed=1), *SIT)
        before = contents(out)
        with pytest.raises(InputError, match="is not empty: give a new folder, or add --overwrite"):
            convert(tmp_path, sit_weights(seed=2), *SIT)
        damaged = sit_weights(seed=2)
        del damaged["blocks.0.attn.qkv.bias"]
        with pytest.raises(InputError, match="1 missing"):
            convert(tmp_path, damaged, *SIT, "--overwrite")
        assert contents(out) == before
        convert(tmp_path, sit_weights(seed=2), *SIT, "--overwrite")
        after = contents(out)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"transformer/diffusion_pytorch_model.safetensors"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "converted"]

    def test_nowhere_else(self, tmp_path):
        source = tmp_path / "sit.pt"
        torch.save(sit_weights(), source)
        with pytest.raises(InputError, match="is a file: give a folder"):
            convert_source(source, source, *SIT)
        with pytest.raises(InputError, match=r"`out` .* cannot be written"):
            convert_source(source, source / "below" / "out", *SIT)
        assert read_checkpoint(source).keys() == sit_weights().keys()

    @pytest.mark.parametrize("limit", [1_000, 60_000], ids=["of configs", "of weights"])
    def test_files_that_cannot_be_written_leave_the_old_folder_as_it_was(self, tmp_path, limit):
        out = convert(tmp_path, sit_weights(seed=1), *SIT)
        before = contents(out)
        torch.save(sit_weights(seed=2), tmp_path / "checkpoint.pt")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # files stop growing there, as on a full disk
        try:
            with pytest.raises(InputError, match="cannot be written"):
                convert_source(tmp_path / "checkpoint.pt", out, *SIT, "--overwrite")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(out) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "converted"]

    def test_damaged_weights_are_not_written(self, tmp_path):
        weights = sit_weights()
        weights["blocks.1.mlp.fc1.bias"][3] = float("nan")
        with pytest.raises(InputError, match=r"1 tensors are not finite: blocks\.1\.mlp\.fc1\.bias"):
            convert(tmp_path, weights, *SIT)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_with_an_autoencoder(self, tmp_path):
        autoencoder = dict(block_out_channels=[8], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"])
        autoencoder.update(up_block_types=["UpDecoderBlock2D"], scaling_factor=0.5)
        for channels in (3, 4):
            AutoencoderKL(latent_channels=channels, **autoencoder).save_pretrained(tmp_path / f"vae{channels}")
        with pytest.raises(InputError, match="latents of 3 channels, but the network works on 4"):
            convert(tmp_path, sit_weights(), *SIT, "--vae", tmp_path / "vae3")
        with pytest.raises(InputError, match="Cannot load the autoencoder"):
            convert(tmp_path, sit_weights(), *SIT, "--vae", tmp_path)
        out = convert(tmp_path, sit_weights(), *SIT, "--vae", tmp_path / "vae4")
        pipeline = InterpolantPipeline.from_pretrained(out)
        assert pipeline([1, 2], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 8, 8)
        assert pipeline.vae.config.scaling_factor == 0.5

    def test_with_names_of_classes(self, tmp_path):
        names = tmp_path / "names.json"
        names.write_text(json.dumps({"id2label": {str(n): f"thing {n}" for n in range(5)}}))
        out = convert(tmp_path, sit_weights(), *SIT, "--id2label", names)
        assert InterpolantPipeline.from_pretrained(out).get_label_ids("thing 3") == [3]
        with pytest.raises(InputError, match="imagenet names 1000 classes, 0 to 999, but the network has 5, 0 to 4"):
            convert(tmp_path, sit_weights(), *SIT, "--id2label", "imagenet", "--overwrite")
        names.write_text("[a, b]")
        with pytest.raises(InputError, match=r"names\.json must hold"):
            convert(tmp_path, sit_weights(), *SIT, "--id2label", names, "--overwrite")

    def test_with_the_names_of_imagenet(self, tmp_path):
        out = convert(tmp_path, sit_weights(rows=1001), *SIT, "--id2label", "imagenet")
        pipeline = InterpolantPipeline.from_pretrained(out)
        assert pipeline.get_label_ids(["goldfish", "golden retriever", "toilet tissue"]) == [1, 207, 999]


class TestDiffusersFolders:
    def test_become_folders_of_our_own_form(self, tmp_path, capsys):
        theirs = save_dit_pipeline(tmp_path / "dit")
        out = tmp_path / "out"
        convert_source(tmp_path / "dit", out)
        pipeline = InterpolantPipeline.from_pretrained(out)
        for name, tensor in theirs.transformer.state_dict().items():
            assert torch.equal(pipeline.transformer.state_dict()[name], tensor)
        assert pipeline.scheduler.config.timestep_type == "discrete"
        assert type(pipeline.vae) is type(theirs.vae)
        assert "found:    diffusers' DiTPipeline teacher" in capsys.readouterr().out

    def test_that_are_ours_already_need_nothing(self, tmp_path, teacher_folder):
        with pytest.raises(InputError, match="is a pipeline folder of this library already"):
            convert_source(teacher_folder, tmp_path / "out")

    def test_of_nothing_known(self, tmp_path):
        with pytest.raises(InputError, match="saved as nothing that diffusers knows"):
            convert_source(tmp_path, tmp_path / "out")
        with pytest.raises(InputError, match="There is no checkpoint file"):
            convert_source(tmp_path / "typo.pt", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_have_no_use_for_settings_of_others(self, tmp_path):
        save_dit_pipeline(tmp_path / "dit")
        with pytest.raises(InputError, match="`which` is 'ema', but the checkpoint is of kind diffusers"):
            convert_source(tmp_path / "dit", tmp_path / "out", "--which", "ema")


def sit(prediction):
    weights = sit_weights(channels=3)
    return weights, (*SIT, "--prediction_type", prediction)


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(lambda: sit("velocity"), id="sit"),
        pytest.param(lambda: sit("epsilon"), id="sit-noise"),
        pytest.param(lambda: (sit_weights(channels=3, learn_sigma=False), (*SIT, "--kind", "repa")), id="repa"),
        pytest.param(lambda: (unet_weights(), UNET), id="torchcfm"),
        pytest.param(lambda: ({"ema_models": {"0.9999": unet_weights(classes=5)}}, UNET), id="realuid"),
    ],
)
def test_a_converted_teacher_is_distilled_and_its_student_sampled(tmp_path, checkpoint):
    content, options = checkpoint()
    teacher = convert(tmp_path, content, *options)
    trainer = distillation(teacher, tmp_path / "student", "--objective", "sid", "--max_steps", 10, "--critic_steps", 1)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    main = runpy.run_path(str(ROOT / "pipelines" / "generate.py"))["main"]
    main(["--pipeline", str(tmp_path / "student"), "--out", str(tmp_path / "grid.png"), "--images_per_label", "2"])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"


def test_distillation_goes_on_from_a_realuid_generator(tmp_path):
    weights = unet_weights(classes=5)
    teacher = convert(tmp_path, {"ema_models": {"0.9999": weights}}, *UNET).rename(tmp_path / "teacher")
    start = convert(tmp_path, {"gen": unet_weights(classes=5, seed=3)}, *UNET)
    trainer = distillation(teacher, tmp_path / "student", "--student", start, "--objective", "sid", "--max_steps", 1)
    trainer.train()
    scheduler = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["init_time"] == 1.0
