"""The script on a teacher that was trained."""

import json

import pytest
from script_runs import command, run

from si_distill.errors import InputError
from si_distill.evaluation.likelihood_report import LikelihoodConfig, measure_likelihood


def test_writes_bits_per_dimension(teacher_folder, tmp_path):
    file = tmp_path / "likelihood.json"
    arguments = ["--teacher", teacher_folder, "--num_samples", 6, "--rtol", 1e-2, "--atol", 1e-2, "--output", file]
    done = run(*command("likelihood.py", *arguments))
    result = json.loads(file.read_text())
    assert f"{result['bits per dimension']:.4f} ± " in done.stdout
    assert result["images"] == 6
    assert 0 < result["bits per dimension"] < 20
    assert result["network evaluations"] > 10
    assert result["settings"] == {"probes": 1, "rtol": 0.01, "atol": 0.01, "seed": 0, "batch_size": 256}


def test_refuses_before_it_loads(tmp_path):
    for settings, words in (
        (dict(), "`teacher` is not set"),
        (dict(teacher="x", rtol=0.0), "`rtol` must be a positive number, got 0.0"),
        (dict(teacher="x", num_samples=0), "num_samples"),
        (dict(teacher="x", output=str(tmp_path / "no" / "l.json")), "in no folder that exists"),
        (dict(teacher=str(tmp_path), output=str(tmp_path / "l.json")), "Cannot load the teacher"),
    ):
        with pytest.raises(InputError, match=words):
            measure_likelihood(LikelihoodConfig(**settings))
