"""Settings of `training/compare.py`."""

from dataclasses import dataclass

from ...errors import InputError
from ...evaluation.config import CACHE
from ...evaluation.metrics import choices
from ...settings import MOST_PROCESSES, MOST_SAMPLES, TRUST, at_least, setting


@dataclass
class CompareConfig:
    """Which runs are made from which teacher, and how their students are measured."""

    teacher: str = setting("", "The teacher: a pipeline folder or a Hub id.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    runs: str = setting("", "YAML file: name → settings of the run, as in a config file of `si-distill train-distill`.")
    base: str = setting("", "Config file of `si-distill train-distill`: what all runs share.")
    only: list[str] = setting([], "Runs to make; all when empty. The table shows all that are there.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of each run.")
    steps: int = setting(1500, "Student updates of each run.")
    points: int = setting(10, "Evaluations along a run, besides the one before it.")
    teacher_steps: list[int] = setting([1, 10, 50], "Euler steps of the teacher's rows.")
    num_samples: int = setting(2000, "Images per evaluation.")
    features: str = setting(
        "pixels",
        "As for `si-distill evaluate`: inception-v3-compat, dinov2, clip, pixels, package.module:Class.",
        names_code=True,
    )
    feature_weights: str | None = setting(None, "File of its weights, if not at torch-fidelity's usual place.")
    reference: str | None = setting(None, "Statistics (.npz) instead of those of the base's `data`.")
    metrics: list[str] = setting(["fid"], f"What to compute: {', '.join(choices())}.")
    batch_size: int = setting(256, "Images generated at once; does not change them.")
    cache_dir: str = setting(CACHE, "Where features of real images are kept.")
    workers: int = setting(1, "Runs side by side, each a process of one thread.")
    output: str = setting("runs/comparison", "Folder of the results and the table: NAME.json and NAME.md.")
    figures: str | None = setting(None, "Folder of the figure, NAME.png; `output` when not given.")
    name: str = setting("comparison", "NAME of these files.")

    def __post_init__(self) -> None:
        for name in ("teacher", "runs", "base"):
            if not getattr(self, name):
                raise InputError(f"`{name}` is not set: give --{name}.")
        for name in ("steps", "points"):
            at_least(name, getattr(self, name), 1)
        at_least("workers", self.workers, 1, MOST_PROCESSES)
        at_least("batch_size", self.batch_size, 1, MOST_SAMPLES)
        at_least("num_samples", self.num_samples, 4)  # precision and recall look at the third neighbour
        for steps in self.teacher_steps:
            at_least("teacher_steps", steps, 1)
        for metric in self.metrics:
            if metric not in choices():
                raise InputError(f"`metrics` holds {metric!r}; choose of: {', '.join(choices())}.")
        if not self.name or self.name != self.name.strip(". ") or any(c in self.name for c in '/\\:*?"<>|'):
            raise InputError(f"`name` is {self.name!r}; it is the beginning of file names.")
