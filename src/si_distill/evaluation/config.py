"""Settings of `training/evaluate.py`."""

from dataclasses import dataclass, field

from ..data.config import DataConfig
from ..errors import InputError
from ..schedulers.scheduling_stochastic_interpolant import SOLVERS
from ..settings import at_least, setting


@dataclass
class EvaluationConfig:
    """What is compared with which real images."""

    pipeline: str = setting("", "The student: a pipeline folder or a Hub id.")
    teacher: str | None = setting(None, "The teacher, to compare with.")
    teacher_steps: list[int] = setting([1, 10, 50], "Solver steps of the teacher, one row each.")
    solver: str = setting("euler", "The teacher's solver.", SOLVERS)
    guidance_scale: float = setting(1.0, "The teacher's guidance; 1 is none.")
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: int | None = setting(None, "Images per row; by default as many as the reference has.")
    batch_size: int = setting(256, "Images generated at once; does not change them.")
    seed: int = setting(0, "Image i is drawn from (seed, i).")
    output: str | None = setting(None, "Where the results go; by default evaluation.json in a local pipeline folder.")

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise InputError(
                "`pipeline` is not set: give the student's folder or Hub id, e.g. --pipeline runs/student."
            )
        at_least("batch_size", self.batch_size, 1)
        at_least("seed", self.seed, 0)
        if self.num_samples is not None:
            at_least("num_samples", self.num_samples, 2)
        for steps in self.teacher_steps:
            at_least("teacher_steps", steps, 1)
