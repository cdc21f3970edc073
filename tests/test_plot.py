"""`python -m si_distill.plot`: what it draws of a run's logs, and what it refuses."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from si_distill.errors import InputError
from si_distill.plot import PlotConfig, draw, main, points, read_curves


@pytest.fixture
def run(tmp_path):
    lines = [{"step": n, "images": 8 * n, "critic_loss": float(n), "field_distance": 1 / n} for n in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluations.jsonl").write_text('{"step": 4, "frechet_distance": 2.5}\n')
    return tmp_path


def test_points_are_the_logs_and_smoothing_their_means(run):
    found = read_curves(str(run))
    assert points(found["metrics.jsonl"], "critic_loss", 1) == ([8.0 * n for n in range(1, 8)], [1, 2, 3, 4, 5, 6, 7])
    assert points(found["metrics.jsonl"], "critic_loss", 3) == ([16, 40, 56], [2, 5, 7])
    assert points(found["evaluations.jsonl"], "frechet_distance", 1) == ([32], [2.5])
    assert points(found["metrics.jsonl"], "loss", 1) == ([], [])


def test_a_page_has_the_panels_that_there_are_data_for(run, tmp_path):
    command = [sys.executable, "-m", "si_distill.plot", str(run), str(run), "--out", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "a.png").width == round(3 * 4.6 * 150)
    (run / "evaluations.jsonl").unlink()
    draw(PlotConfig(runs=[str(run)], out=str(tmp_path / "b.png")))
    assert Image.open(tmp_path / "b.png").width == round(2 * 4.6 * 150)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Name at least one run"),
        (["nowhere"], r"nowhere has no metrics\.jsonl"),
        (["{run}", "--out", "a.nothing"], "cannot be written"),
        (["{run}", "--smooth", "0"], "`smooth` must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(run, argv, words):
    with pytest.raises(InputError, match=words):
        main([word.format(run=run) for word in argv])
