"""`--config NAME`: the package's configs from any folder, and never a file outside of them."""

from pathlib import Path

import pytest

from si_distill.errors import InputError
from si_distill.hub.staging import SPACE
from si_distill.named_configs import CONFIGS, config_names, find_config
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_package_brings_the_folders_at_the_top():
    assert CONFIGS.resolve() == ROOT / "configs"
    assert SPACE.resolve() == ROOT / "pipelines" / "space"


@pytest.mark.parametrize("name", config_names())
def test_every_config_is_found_by_its_name(name):
    assert find_config(name).resolve() == ROOT / "configs" / f"{name}.yaml"


def test_every_config_has_a_name():
    files = (ROOT / "configs").rglob("*.yaml")
    assert {ROOT / "configs" / f"{name}.yaml" for name in config_names()} == set(files)


def test_a_name_is_the_file_with_its_includes():
    argv = ["--teacher", "runs/teacher", "--output_dir", "runs/student"]
    named = parse_settings(DistillConfig, ["--config", "cifar10/distill_sid", "recipes/sida", *argv])
    configs = ROOT / "configs"
    files = [str(configs / "cifar10/distill_sid.yaml"), str(configs / "recipes/sida.yaml")]
    assert named == parse_settings(DistillConfig, ["--config", *files, *argv])


def test_a_file_of_the_working_folder_comes_first():
    Path("digits").mkdir()
    Path("digits/teacher").write_text("max_steps: 7\n")
    assert parse_settings(TeacherConfig, ["--config", "digits/teacher", "--output_dir", "a"]).max_steps == 7


def test_a_folder_hides_no_name():
    Path("digits/teacher").mkdir(parents=True)  # where a run was written
    assert parse_settings(TeacherConfig, ["--config", "digits/teacher"]).max_steps > 7


def test_a_file_includes_by_name():
    Path("own.yaml").write_text("include: [digits/teacher]\nmax_steps: 7\n")
    own = parse_settings(TeacherConfig, ["--config", "own.yaml"])
    named = parse_settings(TeacherConfig, ["--config", "digits/teacher", "--max_steps", "7"])
    assert own == named


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("digits/distil", "no config of that name. Similar names of the package's configs: digits/distill"),
        (
            "configs/digits/distill.yaml",
            "there is no such file. Similar names of the package's configs: digits/distill",
        ),
        ("../configs/digits/distill", "there is no such file."),
        ("digits/../digits/distill", "there is no such file."),
        ("/digits/distill", "there is no such file."),
        ("digits/distill/", "there is no such file."),
        ("", "must hold|is a directory|Is a directory|not a file"),
        ("zzz", r"no config of that name\.$"),
    ],
)
def test_what_is_no_file_and_no_name_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        parse_settings(DistillConfig, ["--config", given, "--teacher", "a", "--output_dir", "b"])
