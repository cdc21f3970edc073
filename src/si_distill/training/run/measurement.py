"""Whether the settings of a run say how its pipeline can be measured, before anything is loaded."""

from pathlib import Path

from ...errors import InputError
from ...evaluation.config import MEASURED, MeasurementConfig
from ...evaluation.metrics import METRICS
from ..config import TrainingConfig


def check_measurement(settings: TrainingConfig, of_prompts: bool) -> None:
    """Refuses measurements that cannot be made.

    Args:
        settings: of a run.
        of_prompts: whether its pipeline makes images of prompts.

    Raises:
        InputError: says what is wrong. Of a scorer's repository only the config is read.
    """
    if settings.eval_metric_steps is None:
        return
    how, name = settings.evaluation, settings.metric_for_best_model
    metric = METRICS[MEASURED[name]]
    if not of_prompts:
        _check_has_no_prompts(how, name, metric.of_prompts)
    if how.reference and not Path(how.reference).is_file():
        raise InputError(f"`evaluation.reference` {how.reference} is no file.")
    if how.prompts_file and not Path(how.prompts_file).is_file():
        raise InputError(
            f"`evaluation.prompts_file` {how.prompts_file} is not a file: give a text file with a prompt in each line."
        )
    if metric.of_real and not how.reference:
        _check_has_images(settings, of_prompts)
    if metric.scorer:
        from ...evaluation.scores import check_model

        model = name.replace("score", "model")
        check_model(f"evaluation.{model}", getattr(how, model))


def _check_has_no_prompts(how: MeasurementConfig, name: str, of_prompts: bool) -> None:
    if of_prompts:
        raise InputError(
            f"`metric_for_best_model` is {name}, which is of images of prompts, and this run's pipeline takes none: choose "
            "frechet_distance or kid."
        )
    for setting in ("prompts_file", "images_per_prompt"):
        if getattr(how, setting) != getattr(MeasurementConfig, setting):
            raise InputError(
                f"`evaluation.{setting}` is of images of prompts, and this run's pipeline takes none: leave it out."
            )


def _check_has_images(settings: TrainingConfig, of_prompts: bool) -> None:
    data, how = settings.data, settings.evaluation
    if of_prompts:
        from ...evaluation.prompts import has_no_images, no_real_images

        if how.prompts_file or has_no_images(data):
            raise no_real_images(f"`metric_for_best_model` is {settings.metric_for_best_model}", "evaluation.")
    if data.streaming:
        raise InputError(
            "`eval_metric_steps` measures against real images, and a stream of them (`data.streaming`) has no index to "
            "compute statistics with: give `evaluation.reference`, a file of them, or leave `eval_metric_steps` out."
        )
