"""`--report_to tensorboard`, with the reader of TensorBoard itself."""

import io

import pytest
from PIL import Image
from script_runs import metrics
from trainer_builders import teaching

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_reads_the_losses_that_the_run_writes(tmp_path):
    teaching(
        tmp_path / "run", "--data.name", "digits", "--max_steps", 2, "--eval_steps", 2, "--report_to", "tensorboard"
    ).train()
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "si_distill")).Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert metrics(tmp_path / "run", "loss") == shown
    picture = events.Images("samples")[-1]
    with Image.open(tmp_path / "run" / "samples" / "step_00000002.png") as drawn:
        shown = Image.open(io.BytesIO(picture.encoded_image_string))
        assert (picture.step, shown.size, shown.tobytes()) == (2, drawn.size, drawn.convert("RGB").tobytes())
