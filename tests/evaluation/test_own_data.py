"""`evaluate.py --pipeline RUN` and `likelihood.py --teacher RUN` measure on the data of that run."""

import pytest

from si_distill.data.of_run import with_data_of_run
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig, LikelihoodConfig

KINDS = [(EvaluationConfig, "pipeline"), (EvaluationConfig, "teacher"), (LikelihoodConfig, "teacher")]


@pytest.fixture
def run(tmp_path):
    data = "{name: parquet, data_files: a.parquet, image_size: 32, split: train}"
    (tmp_path / "config.yaml").write_text(f"data: {data}\nmax_steps: 3\n")
    return tmp_path


def parsed(cls, name, folder, *argv):
    return with_data_of_run(cls, [f"--{name}", str(folder), *argv], "", name).data


@pytest.mark.parametrize(("cls", "name"), KINDS)
@pytest.mark.parametrize(
    ("argv", "expected", "words"),
    [
        ([], ("parquet", 32, "train"), "the run's own config.yaml, 'parquet': --data.name"),
        (["--data.split", "train[:10]"], ("parquet", 32, "train[:10]"), "with data.split=train[:10]"),
        (["--data.name", "digits"], ("digits", 8, "train"), ""),
        (["--data.name", "cifar10", "--data.image_size", "16"], ("cifar10", 16, "train"), ""),
    ],
)
def test_the_run_says_which_images_are_real(run, capsys, cls, name, argv, expected, words):
    data = parsed(cls, name, run, *argv)
    assert (data.name, data.image_size, data.split) == expected
    printed = capsys.readouterr().out
    assert words in printed
    assert bool(printed) is bool(words)


def test_a_pipeline_that_is_no_run_keeps_the_settings(tmp_path, capsys):
    assert parsed(EvaluationConfig, "pipeline", tmp_path).name == "digits"
    assert not capsys.readouterr().out


def test_a_student_distilled_without_data_is_measured_on_its_teachers(run, tmp_path, capsys):
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.yaml").write_text(f"teacher: {run}\ndata: {{name: digits}}\n")
    assert parsed(EvaluationConfig, "pipeline", student).data_files == "a.parquet"
    (student / "config.yaml").write_text(f"teacher: {student}\ndata: {{name: digits}}\n")
    assert parsed(EvaluationConfig, "pipeline", student).name == "digits"


def test_a_damaged_run_is_named(run):
    (run / "config.yaml").write_text("data: {image_size: big}")
    with pytest.raises(InputError, match=r"`data\.image_size` must be a whole number"):
        parsed(EvaluationConfig, "pipeline", run)
