"""Settings of `training/reproduce.py`."""

from dataclasses import dataclass

from ...errors import InputError
from ...settings import LARGEST_SEED, MOST_PROCESSES, at_least, positive, setting


@dataclass
class ReproduceConfig:
    recipe: str = setting("", "A file of configs/, or its name, e.g. cifar10/distill_sid; also without this key.")
    checkpoint: str = setting("", "The teacher as its authors published it: a file.")
    output_dir: str = setting("", "Folder of the reproduction; by default runs/reproduction/ and the recipe's name.")
    published: str = setting("", "File of published figures; by default configs/published.yaml.")
    train: dict = setting(
        {}, "Settings of the training that the recipe leaves to you, e.g. {data: {data_files: …}, compile: true}."
    )
    convert: dict = setting({}, "Settings of the conversion besides those of the published file, e.g. {vae: FOLDER}.")
    accelerate_config: str | None = setting(None, "Accelerate's config file, e.g. configs/accelerate/ddp.yaml.")
    num_processes: int = setting(1, "Processes, one for each GPU; the published batch is kept.")
    features: str | None = setting(
        None,
        "As for `si-distill evaluate`; by default those of the published figures. Others are not compared with them.",
        names_code=True,
    )
    feature_weights: str | None = setting(None, "File of their weights, if not at torch-fidelity's usual place.")
    reference: str | None = setting(None, "Statistics (.npz) instead of those of the recipe's data.")
    num_samples: int = setting(50000, "Images of each measurement.")
    batch_size: int = setting(256, "Images generated at once on each device; does not change them.")
    milestone_images: int | None = setting(
        None, "Images of training between two measurements; by default a fiftieth of the run's."
    )
    tolerance: float = setting(0.05, "Share by which teacher and student may miss their published figures.")
    track_tolerance: float = setting(0.3, "Share by which a milestone may lie above the published curve.")
    patience: int = setting(3, "Milestones in a row off the track that end the run.")
    seed: int = setting(0, "Of the teacher's and the milestones' images; the finished student has the one after it.")

    def __post_init__(self) -> None:
        if not self.recipe:
            raise InputError("Name the recipe: si-distill reproduce cifar10/distill_sid --checkpoint FILE")
        at_least("num_processes", self.num_processes, 1, MOST_PROCESSES)
        at_least("num_samples", self.num_samples, 4)
        at_least("batch_size", self.batch_size, 1)
        at_least("patience", self.patience, 1)
        at_least("seed", self.seed, 0, LARGEST_SEED - 1)
        if self.milestone_images is not None:
            at_least("milestone_images", self.milestone_images, 1)
        for name in ("tolerance", "track_tolerance"):
            positive(name, getattr(self, name))
