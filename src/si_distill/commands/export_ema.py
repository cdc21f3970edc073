"""Makes a pipeline folder from another average of a run's weights than the one in its own pipeline.

    si-distill export-ema --run runs/digits-student --sigma_rel 0.07 --output runs/digits-student-007
    si-distill export-ema --run runs/digits-student --average decay_0.9999 --output runs/digits-student-09999

The first reconstructs a power-function average of any length from `ema_snapshots/`, the second takes one out of `ema/`.
"""

from dataclasses import dataclass

from ..settings import parse_settings, script_main, setting


@dataclass
class ExportConfig:
    run: str = setting("", "The run folder of a teacher or a student.")
    output: str = setting("", "The new pipeline folder.")
    sigma_rel: float | None = setting(None, "Width of the power-function profile, relative to the training's length.")
    step: int | None = setting(None, "Step at which that average ends; the last with snapshots when not given.")
    average: str | None = setting(None, "Name of a file in ema/, without .safetensors.")


def main(argv: list[str]) -> None:
    settings = parse_settings(ExportConfig, argv, __doc__)

    from pathlib import Path

    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..errors import InputError
    from ..pipelines import InterpolantPipeline, OneStepInterpolantPipeline
    from ..training.averaging.ema import EMA_WEIGHTS
    from ..training.averaging.posthoc import EMA_SNAPSHOTS, Snapshots, reconstruct

    run, output = Path(settings.run), Path(settings.output)
    if not settings.run or not settings.output:
        raise InputError("Give --run FOLDER and --output FOLDER.")
    if (settings.sigma_rel is None) == (settings.average is None):
        raise InputError("Give either --sigma_rel, to reconstruct an average, or --average, to take one out of ema/.")
    if settings.step is not None and settings.sigma_rel is None:
        raise InputError(f"--step {settings.step} needs --sigma_rel: ema/ holds the last averages only.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"`output` {output} is not empty: give a new folder.")
    if settings.sigma_rel is not None:
        weights = reconstruct(Snapshots(run / EMA_SNAPSHOTS), settings.sigma_rel, settings.step)
    else:
        file = run / EMA_WEIGHTS / f"{settings.average}.safetensors"
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            names = ", ".join(sorted(path.stem for path in file.parent.glob("*.safetensors"))) or "none"
            raise InputError(f"Cannot read the average {file}: {error}. Averages of this run: {names}.") from error
    try:
        saved = DiffusionPipeline.load_config(run, local_files_only=True)["_class_name"]
        name = saved if isinstance(saved, str) else saved[1]  # a folder with its own code names the module first
        kinds = {kind.__name__: kind for kind in (InterpolantPipeline, OneStepInterpolantPipeline)}
        if name not in kinds:
            raise ValueError(f"it holds a {name}, which is neither of {', '.join(kinds)}")
        pipeline = kinds[name].from_pretrained(run)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot load the pipeline that takes the average: {error}") from error
    try:
        pipeline.transformer.load_state_dict(weights)
    except RuntimeError as error:  # lists every tensor
        raise InputError(
            f"The average has other tensors than the transformer of {run}: it is of another network. Keep the files of one "
            "run together."
        ) from error
    pipeline.save_pretrained(output)
    print(f"Saved {name} with the average: {output}")


if __name__ == "__main__":
    script_main(main)
