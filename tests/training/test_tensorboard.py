"""`--report_to tensorboard`, with the reader of TensorBoard itself."""

import pytest
from script_runs import metrics
from trainer_builders import teaching

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_reads_the_losses_that_the_run_writes(tmp_path):
    teaching(tmp_path / "run", "--data.name", "digits", "--max_steps", 2, "--report_to", "tensorboard").train()
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "si_distill")).Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert metrics(tmp_path / "run", "loss") == shown
