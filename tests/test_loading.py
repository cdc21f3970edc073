"""Pipelines by name: what is said when there is none."""

import pytest

from si_distill import InterpolantPipeline
from si_distill.errors import InputError
from si_distill.loading import load_pipeline


def test_a_folder_that_is_not_there_is_one_sentence_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", str(tmp_path / "typo")):
        with pytest.raises(InputError, match=rf"^Cannot load the teacher '{name}': there is no such folder\. "):
            load_pipeline(InterpolantPipeline, "teacher", name)


def test_a_name_that_the_hub_does_not_give_says_why_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as failed:
        load_pipeline(InterpolantPipeline, "teacher", "nobody/nothing")
    text = str(failed.value)
    assert text.startswith("Cannot load the teacher 'nobody/nothing': there is no such folder, and it cannot be had")
    assert "offline mode is enabled" in text  # the tests' own reason
    assert "\n" not in text
