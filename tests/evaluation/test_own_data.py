"""`evaluate.py --pipeline RUN` compares with the data of that run."""

import runpy
from pathlib import Path

import pytest

from si_distill.evaluation.config import EvaluationConfig
from si_distill.settings import parse_settings

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "training" / "evaluate.py"))


@pytest.mark.parametrize(
    ("argv", "name", "size"),
    [
        ([], "parquet", 32),
        (["--data.name", "cifar10", "--data.image_size", "16"], "cifar10", 16),
    ],
)
def test_the_run_says_which_images_are_real(tmp_path, capsys, argv, name, size):
    (tmp_path / "config.yaml").write_text(
        "data: {name: parquet, data_files: a.parquet, image_size: 32}\nmax_steps: 3\n"
    )
    settings = parse_settings(EvaluationConfig, ["--pipeline", str(tmp_path), *argv])
    SCRIPT["use_own_data"](settings)
    assert (settings.data.name, settings.data.image_size) == (name, size)
    assert ("the run's own config.yaml, 'parquet'" in capsys.readouterr().out) is (not argv)


def test_a_pipeline_that_is_no_run_keeps_the_settings(tmp_path, capsys):
    settings = parse_settings(EvaluationConfig, ["--pipeline", str(tmp_path)])
    SCRIPT["use_own_data"](settings)
    assert settings.data.name == "digits"
    assert not capsys.readouterr().out
