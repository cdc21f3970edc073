"""What a run writes besides its checkpoints: sample grids, the pipeline and its card, the best one, Hub uploads.

Everything that samples or writes is collective: all ranks call it, because a sharded network needs all of them, and rank 0
writes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ...errors import InputError, PublishError, TrainingStopped
from ...hub.card import write_card
from ...hub.publishing import Published, publish_pipeline, upload
from ...hub.text_staging import stage_text_student
from ...pipelines.interpolant_pipeline_base import InterpolantPipelineBase
from ...text_to_image.student import TextToImageStudent, is_text_student
from ..averaging.ema import Averages
from ..config import TrainingConfig
from ..parallel.accelerator import agree
from .checkpoints import WRITE_ERRORS
from .folder import RunFolder
from .trackers import show_picture

if TYPE_CHECKING:
    from .measured import Measured


class Outputs:
    """Writes the samples, pipelines and uploads of a run.

    Args:
        settings: of the run.
        accelerator: of the run.
        run: its folder.
        averages: the networks that the pipeline gets.
        pipeline: the run's pipeline around a network, or around the average in training when none is given.
        sample_grid: a picture from fixed noise and labels.
        measured: gives the images of the pipeline that `eval_metric_steps` measures.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        accelerator: Accelerator,
        run: RunFolder,
        averages: Averages,
        pipeline: Callable[[nn.Module | None], DiffusionPipeline],
        sample_grid: Callable[[], Image.Image],
        measured: "Callable[[], Measured]",
    ):
        self.settings, self.accelerator, self.run = settings, accelerator, run
        self.averages = averages
        self._pipeline, self._sample_grid = pipeline, sample_grid
        self.best = None
        if settings.eval_metric_steps is not None:
            from .best_model import BestModel  # brings the libraries of feature extractors with it

            self.best = BestModel(settings, accelerator, measured)

    def samples(self, step: int) -> None:
        """samples/step_N.png, which the trackers get too; collective."""
        picture = self._picture()
        self.write("samples", step, lambda: picture.save(self.run.sample_path(step)))
        show_picture(self.accelerator, picture, step)

    def pipeline(self, step: int) -> None:
        """The pipeline at the top of the run folder, with its card; collective."""
        pipeline = self._whole_pipeline()

        def write() -> None:
            self.run.write_pipeline(pipeline)
            if not isinstance(pipeline, (InterpolantPipelineBase, TextToImageStudent)):
                return  # a teacher that is a stock pipeline or an adapter, of which there is no card
            try:
                write_card(self.run.path)
            except InputError as error:  # a damaged file of the folder's owner is no reason to stop
                print(f"The model card is not renewed: {error}")

        self.write("the pipeline", step, write)

    def measure(self, step: int) -> dict[str, float]:
        """Figures of the pipeline as it is now, on the main process; keeps it if it is the best so far. Collective."""
        figures = self.best.measure()
        (better,) = broadcast_object_list([self.best.improves(figures)])  # what the main process says
        picture, pipeline = (self._picture(), self._whole_pipeline()) if better else (None, None)

        def write() -> None:
            if better:
                self.best.keep(step, figures, pipeline, picture)
            self.best.note(step, figures, better)

        self.write("the best model", step, write)
        return {name: value for name, value in figures.items() if value is not None}

    def publish(self) -> None:
        """Puts the finished pipeline on the Hub; rank 0 alone.

        Raises:
            PublishError: when the Hub refuses; the run folder is whole.
        """
        settings = self.settings
        try:
            published = self._publish(settings.hub_model_id, settings.hub_private_repo or None)
        except (InputError, PublishError) as error:
            raise PublishError(
                f"{error} The training is finished and {self.run.path} is whole; publish it later with: "
                f"si-distill publish --pipeline {self.run.path} --repo-id {settings.hub_model_id}"
            ) from error
        print(f"Published: {published.url} at {published.commit}.")

    def _publish(self, repo_id: str, private: bool | None) -> Published:
        if is_text_student(str(self.run.path)):
            folder = self.run.path / "hub" / "model"
            stage_text_student(self.run.path, folder, repo_id)
            return upload(folder, repo_id, "model", private)
        pipeline = type(self._pipeline(None)).from_pretrained(self.run.path)
        return publish_pipeline(pipeline, repo_id, private)

    def write(self, what: str, step: int, action: Callable[[], None]) -> None:
        """Does `action` on rank 0; collective.

        Raises:
            TrainingStopped: on every rank, when the disk is full or the folder is lost: one that failed alone would leave
                the others waiting.
        """
        error = agree(self.accelerator, action if self.accelerator.is_main_process else lambda: None, WRITE_ERRORS)
        if error:
            raise TrainingStopped(
                f"Could not write {what} to {self.run.path} at step {step}: {error}. Whole checkpoints stay; make room "
                "and resume with --resume_from_checkpoint latest."
            )

    @torch.no_grad()
    def _picture(self) -> Image.Image:
        try:
            # `compile` would compile every block once more for the grid's batch, and for each adapter.
            with torch.compiler.set_stance("force_eager"):
                return self._sample_grid()
        except ValueError as error:
            raise TrainingStopped(
                f"The network's samples cannot be drawn: {error} Earlier checkpoints stay: resume from one, with a lower "
                "learning rate."
            ) from error

    def _whole_pipeline(self) -> DiffusionPipeline | None:
        """On rank 0 the pipeline around a network that holds all of its weights; elsewhere nothing. Collective."""
        network = self.averages.whole_network()
        return None if network is None else self._pipeline(network)
