"""Places that the user names, of pipelines and files: what is said when there is nothing."""

import pytest

from si_distill import InterpolantPipeline
from si_distill.autoencoders import describe_vae, load_vae
from si_distill.commands import train_distill
from si_distill.conversion.diffusers_teachers import saved_class
from si_distill.data import DataConfig
from si_distill.data.columns import open_dataset
from si_distill.errors import InputError
from si_distill.loading import load_pipeline
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run


def load_teacher(name):
    return load_pipeline(InterpolantPipeline, "teacher", name)


def rehearse(name):
    return dry_run(DistillConfig(teacher=name, output_dir="run"))


def distil(name):
    train_distill.main(["--teacher", name, "--output_dir", "run"])


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/digits-teacher").mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a fox\n")


@pytest.mark.parametrize(
    "name", ["models/typo", "./typo", "~/no/such", "runs/typo", "a/b/c", "/no/such", "./" + "n" * 300]
)
@pytest.mark.parametrize("load", [load_teacher, rehearse, distil, load_vae, describe_vae, saved_class])
def test_a_path_that_is_not_there_is_one_sentence_and_the_hub_is_not_asked(name, load):
    with pytest.raises(
        InputError, match=rf"^Cannot load the \w+ '.*{name.lstrip('~')}': there is no such folder\."
    ) as failed:
        load(name)
    assert "Hub" not in str(failed.value)


@pytest.mark.parametrize("load", [load_teacher, rehearse, distil, load_vae, saved_class])
def test_similar_names_are_offered(load):
    with pytest.raises(InputError, match=r"no such folder\. Did you mean models/digits-teacher\?"):
        load("models/digit-teacher")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"name": "models/digit-teacher"},
            "Cannot load the data set .* no such folder. Did you mean models/digits-teacher",
        ),
        ({"name": "text", "data_files": "promts.txt"}, r"promts\.txt' Did you mean prompts\.txt\?"),
    ],
)
def test_similar_names_of_data_are_offered(data, words):
    with pytest.raises(InputError, match=words):
        open_dataset(DataConfig(**data))


@pytest.mark.parametrize("load", [load_teacher, rehearse, load_vae])
def test_a_name_that_the_hub_does_not_give_says_why_in_one_sentence(load):
    with pytest.raises(InputError) as failed:
        load("nobody/nothing")
    text = str(failed.value)
    assert "'nobody/nothing': there is no such folder, and it cannot be had from the Hub: " in text
    assert "offline mode is enabled" in text  # the tests' own reason
    assert "\n" not in text
