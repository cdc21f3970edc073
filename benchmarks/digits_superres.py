#!/usr/bin/env python
"""Digits from 4×4 to 8×8 pixels on held-out inputs: one-step student, its bridge teacher, regression and bicubic.

    python benchmarks/digits_superres.py --workers 2
    python benchmarks/digits_superres.py --seeds 0 --max_steps 20 --runs runs/try --output runs/try --figures runs/try

Each seed trains a teacher (configs/digits_superres/teacher.yaml), its student (distill.yaml) and, with the settings and
updates of the teacher, its network on plain least squares at (x1, t = 1): the same architecture, one evaluation. Inputs and
truth are digits that none of them saw; each row has one image of each. Finished runs are kept in --runs and not made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import Workers, advance, cell, hardware, hardware_line, markdown_table, write_json, write_text

from si_distill.settings import at_least, parse_settings, script_main, setting

FIGURES = ("Fréchet distance", "PSNR", "label accuracy", "diversity")
DIGITS = {"Fréchet distance": 3, "PSNR": 2, "label accuracy": 3, "diversity": 3}
#: Noise of the evaluated images: the same for every run.
EVALUATION_SEED = 0


@dataclass
class SuperresConfig:
    """Settings of the comparison."""

    configs: str = setting("configs/digits_superres", "Folder of teacher.yaml and distill.yaml.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of the trainings.")
    split: str = setting("train[1297:]", "The digits that are judged on; the configs train on the others.")
    teacher_steps: list[int] = setting([10, 50], "Steps of the teacher, one row each.")
    max_steps: int | None = setting(None, "Updates of each training, instead of the configs' own.")
    workers: int = setting(2, "Processes of one thread.")
    runs: str = setting("runs/digits-superres", "Where the runs are kept.")
    output: str = setting("benchmarks/results", "Folder of digits_superres.json and digits_superres.md.")
    figures: str = setting("docs/images", "Folder of digits_superres.png.")

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)
        if self.max_steps is not None:
            at_least("max_steps", self.max_steps, 1)


class Judge:
    """Held-out inputs, their truth and the classifier: what every row of a process shares."""

    def __init__(self, config: SuperresConfig):
        from si_distill.data import DataConfig, load_images
        from si_distill.evaluation.classifier import DigitsClassifier
        from si_distill.evaluation.inputs import Inputs
        from si_distill.training.config import TeacherConfig

        trained = parse_settings(TeacherConfig, ["--config", f"{config.configs}/teacher.yaml"]).data
        self.degradation = trained.build_degradation()
        held_out = DataConfig(
            split=config.split, degradation=trained.degradation, degradation_kwargs=trained.degradation_kwargs
        )
        self.data = load_images(held_out)
        self.truth = self.data.read_all()[0]
        self.inputs = Inputs(self.data, held_out, list(range(len(self.data))), EVALUATION_SEED)
        # Trained on all digits: it judges, and nothing learns from it.
        self.classifier = DigitsClassifier(*load_images(DataConfig()).read_all())

    def figures(self, images, spread: float = 0.0) -> dict[str, float]:
        """Of one image (uint8) for each input, and the variance of a pixel over images of one input."""
        from si_distill.evaluation.formulas import frechet_distance, peak_signal_to_noise

        return {
            "Fréchet distance": frechet_distance(images, self.truth),
            "PSNR": float(peak_signal_to_noise(images, self.truth).mean()),
            "label accuracy": self.classifier.accuracy(images, self.data.labels),
            "diversity": spread**0.5,
        }

    def pipeline(self, pipeline, **sampler: Any) -> tuple[dict[str, float], Any]:
        """Figures of a pipeline's images, and the images."""
        import numpy as np

        from si_distill.evaluation.samples import PipelineSource

        pipeline.set_progress_bar_config(disable=True)
        source = PipelineSource(
            pipeline,
            lambda **given: pipeline(**given, output_type="pt", **sampler),
            self.data.labels,
            EVALUATION_SEED,
            inputs=self.inputs,
        )
        batch = source.read(range(len(source)))
        return self.figures(batch.images, float(np.nanmean(batch.compared["spread"]))), batch.images

    def bicubic(self):
        """The small images, enlarged without learning."""
        from si_distill.pipelines.interpolant_pipeline_images import upsample
        from si_distill.visualization import to_uint8

        small = self.degradation.small(self.truth.float() / 127.5 - 1)
        return to_uint8(upsample(small, self.degradation.factor, "bicubic"))


def train(kind: str, seed: int, config: SuperresConfig, folder: Path) -> Any:
    """The pipeline of a finished run, trained if it is not there yet: `teacher`, `regression` or `student`."""
    import torch

    from si_distill import InterpolantPipeline, OneStepInterpolantPipeline
    from si_distill.training.config import TeacherConfig
    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.distillation.trainer import DistillationTrainer
    from si_distill.training.teacher import TeacherTrainer

    class RegressionTrainer(TeacherTrainer):
        """Least squares on the pairs: at t = 1 x_t is the reference, whatever the noise, and the target is the sample."""

        def setup(self) -> None:
            super().setup()
            self.time_sampler = torch.ones_like

    trainer, settings, pipeline, file = {
        "teacher": (TeacherTrainer, TeacherConfig, InterpolantPipeline, "teacher"),
        "regression": (RegressionTrainer, TeacherConfig, InterpolantPipeline, "teacher"),
        "student": (DistillationTrainer, DistillConfig, OneStepInterpolantPipeline, "distill"),
    }[kind]
    output = folder / kind
    argv = ["--config", f"{config.configs}/{file}.yaml", "--seed", str(seed), "--output_dir", str(output)]
    argv += [] if config.max_steps is None else ["--max_steps", str(config.max_steps)]
    argv += ["--teacher", str(folder / "teacher")] if kind == "student" else []
    made = parse_settings(settings, argv)
    finished = output / "checkpoints" / f"step_{made.max_steps:08d}"
    if not finished.exists():
        made.overwrite_output_dir = True
        trainer(made).train()
    advance()
    return pipeline.from_pretrained(output)


def compare(seed: int, config: SuperresConfig) -> dict[str, Any]:
    """All rows of one seed; of the first, the picture too."""
    folder, judge = Path(config.runs) / f"seed{seed}", Judge(config)
    teacher, regression, student = (train(kind, seed, config, folder) for kind in ("teacher", "regression", "student"))
    shown: dict[str, Any] = {}
    rows: dict[str, dict[str, float]] = {"bicubic": judge.figures(judge.bicubic())}
    rows["regression"], shown["regression"] = judge.pipeline(regression, num_inference_steps=1)
    for steps in config.teacher_steps:
        name = f"teacher, {steps} steps"
        rows[name], shown[name] = judge.pipeline(teacher, num_inference_steps=steps)
    rows["student, 1 step"], shown["student, 1 step"] = judge.pipeline(student)
    if seed == config.seeds[0]:
        draw(judge, shown, Path(config.figures) / "digits_superres.png")
    return {"seed": seed, "rows": rows}


def draw(judge: Judge, shown: dict[str, Any], path: Path) -> None:
    """Of the first held-out digit of each class: input, every method, truth."""
    from si_distill.evaluation.pictures import draw_samples
    from si_distill.visualization import to_uint8

    chosen = [judge.data.labels.index(digit) for digit in range(10)]
    rows = [("input", to_uint8(judge.inputs.read(chosen))), ("bicubic", judge.bicubic()[chosen])]
    rows += [(name, images[chosen]) for name, images in shown.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_samples([*rows, ("truth", judge.truth[chosen])], [str(digit) for digit in range(10)], path)


def table(results: list[dict[str, Any]], facts: dict[str, Any], config: SuperresConfig) -> str:
    """Mean and spread over the seeds, and what was to be shown."""
    names = list(results[0]["rows"])
    values = {n: {f: [result["rows"][n][f] for result in results] for f in FIGURES} for n in names}
    lines = [[n, *(cell(values[n][f], DIGITS[f]) for f in FIGURES)] for n in names]
    distances = {n: sum(values[n]["Fréchet distance"]) / len(results) for n in names}
    student, teacher = distances["student, 1 step"], distances[f"teacher, {max(config.teacher_steps)} steps"]
    return "\n".join(
        [
            markdown_table(["", *FIGURES], lines),
            "",
            f"Fréchet distance on pixels (not an FID) to the truth of the {config.split} inputs, one image each; label "
            "accuracy by a support-vector classifier trained on all real digits; diversity is the standard deviation of a "
            f"pixel in [0, 1] over 8 images of one input. Mean ± standard deviation over seeds {config.seeds}.",
            "",
            f"The student's distance is {student / teacher:.3f} of the teacher's with {max(config.teacher_steps)} steps, "
            f"{student / distances['regression']:.3f} of the regression's and {student / distances['bicubic']:.3f} of "
            "bicubic's.",
            "",
            hardware_line(facts),
        ]
    )


def main(argv: list[str]) -> None:
    config = parse_settings(SuperresConfig, argv, __doc__)
    with Workers(config.workers) as workers:
        tasks = [(seed, config) for seed in config.seeds]
        results = sorted(workers.run(compare, tasks, 3 * len(tasks), "trainings"), key=lambda result: result["seed"])
    facts = hardware(config.workers)
    output = Path(config.output)
    write_json(output / "digits_superres.json", {"hardware": facts, "split": config.split, "results": results})
    text = table(results, facts, config)
    write_text(output / "digits_superres.md", text + "\n")
    print(text)


if __name__ == "__main__":
    script_main(main)
