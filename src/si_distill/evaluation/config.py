"""Settings of `training/evaluate.py` and `training/likelihood.py`."""

import os
from dataclasses import dataclass, field

from ..data.config import DataConfig
from ..errors import InputError
from ..schedulers.interpolant_solvers import SOLVERS
from ..settings import LARGEST_SEED, MOST_SAMPLES, TRUST, at_least, positive, setting
from .metrics import choices

#: File of the results in a pipeline folder.
EVALUATION = "evaluation.json"
#: Largest height and width of images of prompts.
MOST_SIDE = 2**14
#: Where features of real images are kept.
CACHE = os.environ.get("SI_DISTILL_CACHE", "~/.cache/si_distill")
#: Metrics that the best pipeline of a run can be chosen by: names of the setting, and those of `METRICS`.
MEASURED = {
    "frechet_distance": "Fréchet distance",
    "kid": "KID",
    "clip_score": "CLIP score",
    "pick_score": "PickScore",
}
#: Images of a measurement while training, at most, unless it is told how many.
MEASURED_IMAGES = 2000
CLIP_MODEL, PICK_MODEL = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


@dataclass
class MeasurementConfig:
    """How a run's pipeline is measured while it trains; the real images, and the prompts, are those of `data`."""

    features: str = setting(
        "pixels",
        "As for `si-distill evaluate`: inception-v3-compat, dinov2, clip, pixels, package.module:Class.",
        names_code=True,
    )
    feature_weights: str | None = setting(None, "File of its weights, if not at torch-fidelity's usual place.")
    reference: str | None = setting(None, "Statistics (.npz) instead of those of `data`.")
    prompts_file: str | None = setting(None, "Prompts of text-to-image pipelines instead of those of `data`, as there.")
    images_per_prompt: int = setting(1, "Images of each prompt.")
    clip_model: str = setting(CLIP_MODEL, "CLIPModel of clip_score: a folder or a Hub id.")
    pick_model: str = setting(PICK_MODEL, "CLIPModel of pick_score: a folder or a Hub id.")
    num_samples: int | None = setting(
        None, f"Images per measurement; by default {MEASURED_IMAGES:,}, or of fewer prompts all."
    )
    num_inference_steps: int = setting(20, "Steps of a teacher; a student has its own.")
    kid_subsets: int = setting(10, "Subsets of up to 1,000 images that KID is a mean over.")
    batch_size: int = setting(256, "Images generated at once on each device.")
    cache_dir: str = setting(CACHE, "Where features of real images are kept.")

    def __post_init__(self) -> None:
        if self.num_samples is not None:
            at_least("evaluation.num_samples", self.num_samples, 4)
        for name in ("num_inference_steps", "kid_subsets"):
            at_least(f"evaluation.{name}", getattr(self, name), 1)
        for name in ("batch_size", "images_per_prompt"):
            at_least(f"evaluation.{name}", getattr(self, name), 1, MOST_SAMPLES)


@dataclass
class EvaluationConfig:
    """What is compared with which real images."""

    pipeline: str | None = setting(None, "The student: a pipeline folder or a Hub id.")
    teacher: str | None = setting(None, "The teacher, alone or to compare with: a pipeline folder or a Hub id.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    images: str | None = setting(None, "Finished images: a folder, or an .npz of samples (arr_0, uint8, NHWC).")
    teacher_steps: list[int] = setting([1, 10, 50], "Steps of the teacher, one row each.")
    solver: list[str] = setting([], f"Solvers, rows of each; by default the teacher's own: {', '.join(SOLVERS)}.")
    solver_kwargs: dict = setting({}, "Settings of the solvers, e.g. {diffusion_form: linear} or {rtol: 1e-4}.")
    guidance_scale: float | None = setting(
        None, "The teacher's guidance; 1 is none, and the default. A text-to-image pipeline's own number, and default."
    )
    guidance_interval: list[float] = setting([0.0, 1.0], "Smallest and largest time with guidance.")
    prompts_file: str | None = setting(
        None, "Prompts of text-to-image pipelines, one in each line; by default the `data.caption_column` of `data`."
    )
    images_per_prompt: int = setting(1, "Images of each prompt; `diversity` needs 2.")
    height: int | None = setting(None, "Height of images of prompts; by default the student's, or the teacher's own.")
    width: int | None = setting(None, "Width of images of prompts.")
    dtype: str = setting("float32", "Precision of text-to-image pipelines.", ("float32", "bfloat16"))
    clip_model: str = setting(CLIP_MODEL, "CLIPModel of clip_score: a folder or a Hub id.")
    pick_model: str = setting(PICK_MODEL, "CLIPModel of pick_score: a folder or a Hub id.")
    data: DataConfig = field(default_factory=DataConfig)
    reference: str | None = setting(
        None, "Statistics (.npz with mu and sigma), published or cached, instead of `data`."
    )
    features: str = setting(
        "pixels", "inception-v3-compat, dinov2, clip, pixels, or your own package.module:Class.", names_code=True
    )
    feature_weights: str | None = setting(None, "File of its weights, if not at torch-fidelity's usual place.")
    metrics: list[str] = setting(
        list(choices()), f"What to compute: {', '.join(choices(of_prompts=True))}; the last ones only of prompts."
    )
    kid_subsets: int = setting(100, "Subsets of up to 1,000 images that KID is a mean over.")
    bootstrap_resamples: int | None = setting(
        None, "Resamples behind the intervals, 0 for none; by default 200, or 20 on more than 512 features."
    )
    num_samples: int | None = setting(None, "Images per row; by default as many as the data set has.")
    class_balance: str = setting("data", "Classes as in `data`, or equally many of each.", ("data", "uniform"))
    batch_size: int = setting(256, "Images generated at once; does not change them.")
    seed: int = setting(0, "Image i is drawn from (seed, i).")
    save_npz: bool = setting(False, "Keep the images as one .npz per row (arr_0, arr_1: ADM's evaluator).")
    save_images: bool = setting(False, "Keep the images as PNG files, a folder per row.")
    output: str | None = setting(None, "Where the results go; by default evaluation.json in a local pipeline folder.")
    cache_dir: str = setting(CACHE, "Where features of real images are kept.")

    def __post_init__(self) -> None:
        if not (self.pipeline or self.teacher or self.images):
            raise InputError(
                "There is nothing to evaluate: set `pipeline` (a student, e.g. --pipeline runs/student), `teacher` or "
                "`images`."
            )
        at_least("batch_size", self.batch_size, 1, MOST_SAMPLES)
        at_least("kid_subsets", self.kid_subsets, 1)
        at_least("seed", self.seed, 0, LARGEST_SEED)
        if self.bootstrap_resamples is not None and (self.bootstrap_resamples < 0 or self.bootstrap_resamples == 1):
            raise InputError(f"`bootstrap_resamples` must be 0 or at least 2, got {self.bootstrap_resamples}.")
        if self.num_samples is not None:
            at_least("num_samples", self.num_samples, 4)  # precision and recall look at the third neighbour
        if len(self.guidance_interval) != 2:
            raise InputError(f"`guidance_interval` is two times, e.g. 0.1 0.8; got {self.guidance_interval}.")
        at_least("images_per_prompt", self.images_per_prompt, 1, MOST_SAMPLES)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1, MOST_SIDE)
        if (self.height is None) != (self.width is None):
            raise InputError(
                f"`height` is {self.height} and `width` {self.width}: give both, or neither for the pipeline's own size."
            )
        if "diversity" in self.metrics and self.images_per_prompt < 2:
            raise InputError(
                "`metrics` holds diversity, which compares images of one prompt: set --images_per_prompt 2."
            )
        if self.guidance_scale is None and not self.has_prompts:
            self.guidance_scale = 1.0
        for steps in self.teacher_steps:
            at_least("teacher_steps", steps, 1)
        for name, known in (("solver", SOLVERS), ("metrics", choices(of_prompts=True))):
            for value in getattr(self, name):
                if value not in known:
                    raise InputError(f"`{name}` holds {value!r}; choose of: {', '.join(known)}.")
        if not self.metrics:
            raise InputError(f"`metrics` is empty; choose of: {', '.join(choices(of_prompts=True))}.")

    @property
    def has_prompts(self) -> bool:
        """Whether the images are those of prompts."""
        return self.prompts_file is not None or self.data.caption_column is not None or self.data.name == "text"


@dataclass
class LikelihoodConfig:
    """Whose likelihood of which images."""

    teacher: str | None = setting(None, "The teacher: a pipeline folder or a Hub id.")
    trust_remote_code: bool = setting(False, TRUST, names_code=True)
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: int | None = setting(None, "The first images of the data; by default all.")
    probes: int = setting(1, "Hutchinson's probes for each image; 0 computes the exact trace (small images).")
    rtol: float = setting(1e-5, "Relative tolerance of the solver.")
    atol: float = setting(1e-5, "Absolute tolerance of the solver.")
    batch_size: int = setting(256, "Images at once.")
    seed: int = setting(0, "Dequantisation and probes of image i are drawn from (seed, i).")
    output: str | None = setting(None, "JSON file; by default likelihood.json in a local teacher folder.")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise InputError("`teacher` is not set: give its folder or Hub id, e.g. --teacher runs/teacher.")
        for name in ("rtol", "atol"):
            positive(name, getattr(self, name))
        at_least("probes", self.probes, 0)
        at_least("batch_size", self.batch_size, 1, MOST_SAMPLES)
        at_least("seed", self.seed, 0, LARGEST_SEED)
        if self.num_samples is not None:
            at_least("num_samples", self.num_samples, 1)
