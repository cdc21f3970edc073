"""Every file under configs/ is read, accepted and dry-run, and says what its source says."""

import re
from pathlib import Path

import pytest
import yaml
from latent_caches import tiny_autoencoder

from si_distill.data.latents.config import LatentsConfig
from si_distill.data.latents.encoding import dry_run as plan
from si_distill.settings import parse_settings
from si_distill.training.config import TeacherConfig, TrainingConfig
from si_distill.training.distillation.config import DistillConfig
from si_distill.training.dry_run.report import dry_run

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.stem.startswith(("teacher", "distill")))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
TEXTS = sorted(CONFIGS.glob("text-to-image/*.yaml"))  # see test_text_distillation
LATENTS = sorted(CONFIGS.glob("*/latents.yaml"))
BASES = sorted((CONFIGS / "bases").glob("*.yaml"))

#: Parameters in millions. EDM: 55.7, 61.8 and 295.9; EDM2: 125, 280, 498, 777, 1119 and 1523; SiT: 33 and 675.
PUBLISHED = {
    "cifar10/distill_sid": 55.7,
    "cifar10/distill_realuid": 35.7,
    "ffhq64/distill_sid": 61.8,
    "imagenet64/distill_sid": 295.9,
    "imagenet256/distill_s2": 32.9,
    "imagenet256/distill": 674.8,
    "imagenet512/distill_xs": 124.7,
    "imagenet512/distill_s": 280.2,
    "imagenet512/distill_m": 497.8,
    "imagenet512/distill_l": 777.5,
    "imagenet512/distill_xl": 1119.3,
    "imagenet512/distill_xxl": 1523.2,
}


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def read(*paths: Path) -> TrainingConfig:
    kind = TeacherConfig if paths[0].stem.startswith("teacher") else DistillConfig
    return parse_settings(kind, [word for path in paths for word in ("--config", str(path))])


def with_includes(path: Path) -> set[Path]:
    included = yaml.safe_load(path.read_text(encoding="utf-8")).get("include", [])
    return {path.resolve()}.union(*(with_includes(path.parent / file) for file in included))


def report(settings: TrainingConfig) -> dict[str, str]:
    lines = (line.split(":", 1) for line in dry_run(settings).splitlines())
    return {key: text.strip() for key, text in lines}


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    # `teacher_model.training` is a path as the scripts are given it; runs that `make demo` left must not be seen.
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_run_is_accepted_and_dry_run(path, monkeypatch):
    settings, text = read(path), path.read_text(encoding="utf-8")
    found = re.search(r"# ([\d,]+) = (\d+) × (\d+) × (\d+) processes", text)
    total, device, micro, processes = (
        (int(number.replace(",", "")) for number in found.groups()) if found else [None] * 4
    )
    if found:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (device, micro)
        millions = re.search(r"max_steps: \d+ +# ([\d,]+) million images", text)
        if millions:
            assert settings.max_steps == int(millions[1].replace(",", "")) * 1_000_000 // total
    if isinstance(settings, TeacherConfig) and settings.is_text_to_image:
        return  # its pipeline is built first, by a benchmark; there is no dry run of it
    lines = report(settings)
    if found:
        assert f"= {total:,} images per update" in lines["batch"]
    assert lines["memory"].startswith("about ")
    assert settings.output_dir in lines["writes"]
    if name(path) in PUBLISHED:
        parameters = int(re.search(r"([\d,]+) parameters", lines["network"])[1].replace(",", ""))
        assert round(parameters / 1e6, 1) == pytest.approx(PUBLISHED[name(path)], abs=0.11)


@pytest.mark.parametrize(
    ("path", "pixels", "shape", "size"),
    [
        (LATENTS[0], 256, "4 × 32 × 32", "32 KiB"),
        (LATENTS[1], 512, "4 × 64 × 64", "128 KiB"),
    ],
    ids=["256", "512"],
)
def test_latents_are_those_that_the_runs_beside_them_read(path, pixels, shape, size, tmp_path):
    tiny_autoencoder(levels=4).save_pretrained(tmp_path / "vae")
    settings = parse_settings(LatentsConfig, ["--config", str(path), "--vae", str(tmp_path / "vae")])
    assert f"{shape}, mean and standard deviation, float16, of each image and its mirror image: {size}" in plan(
        settings
    )
    runs = [read(run) for run in RUNS if run.parent == path.parent]
    assert {(run.data.name, run.data.image_size) for run in runs} == {(settings.output_dir, pixels)}
    assert settings.data.image_size == pixels


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_every_recipe_lies_over_a_run(recipe):
    base = CONFIGS / ("imagenet512/distill_xs.yaml" if recipe.stem.endswith("edm2") else "digits/distill.yaml")
    alone, settings = read(base), read(base, recipe)
    chosen = {file: yaml.safe_load(file.read_text(encoding="utf-8")).get("objective") for file in with_includes(recipe)}
    assert settings.objective in chosen.values()
    assert (settings.teacher, settings.max_steps) == (alone.teacher, alone.max_steps)
    assert settings.objective in report(settings)["objective"]


def test_every_file_is_tested():
    read_here = set().union(*(with_includes(path) for path in (*RUNS, *RECIPES, *TEXTS)))
    assert {path.resolve() for path in BASES} <= read_here
    launcher = set((CONFIGS / "accelerate").glob("*.yaml"))  # see test_settings
    figures = {CONFIGS / "published.yaml"}  # see test_reproduction
    assert {*RUNS, *RECIPES, *BASES, *LATENTS, *TEXTS} | launcher | figures == {
        path for path in CONFIGS.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("path", [*RUNS, *RECIPES, *BASES, *LATENTS, *TEXTS], ids=name)
def test_every_file_says_where_its_values_are_from(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    known = "et al. 2|run_sid|run_sida|run\\.sh|RealUID|SiD|own|DMD2|configs/|report"
    assert re.search(known, text)
