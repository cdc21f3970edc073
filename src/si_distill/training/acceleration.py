"""The accelerator of a run, as its settings and its launcher want it."""

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ..errors import InputError
from ..launching import check_processes
from .config import TrainingConfig


def build_accelerator(settings: TrainingConfig) -> Accelerator:
    """The accelerator.

    Raises:
        InputError: when the settings and the launcher do not go together.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_dir=settings.output_dir,
            # Buffers never differ between ranks, and gradients need no copy beside the buckets that are reduced.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise InputError(f"Accelerate refuses the settings: {error}") from error
    check_processes(accelerator.num_processes)
    return accelerator
