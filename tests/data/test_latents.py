"""Latent caches: what they hold, how they are made again after a kill, and what is refused."""

import json
import shutil
import signal
import sys

import datasets
import pytest
import torch
from helpers import tiny_sit
from latent_caches import CACHE, precompute, tiny_autoencoder
from safetensors import safe_open
from script_runs import ROOT, command, run

from si_distill import InterpolantPipeline, StochasticInterpolantScheduler, fingerprints
from si_distill.autoencoders import load_vae
from si_distill.data import DataConfig, load_images
from si_distill.data.latents.config import LatentsConfig
from si_distill.data.latents.dataset import LatentDataset, sampled
from si_distill.data.latents.encoding import print_dry_run
from si_distill.data.latents.format import read_manifest
from si_distill.errors import InputError
from si_distill.pipelines import LatentScaling
from si_distill.settings import parse_settings


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(vae_folder, tmp_path_factory):
    return precompute(vae_folder, tmp_path_factory.mktemp("latents") / "cache")


@pytest.fixture
def damaged(cache, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(cache, tmp_path / "cache")


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("[!.]*")) if p.is_file()}


def opened(folder, **settings):
    return LatentDataset(DataConfig(name=str(folder), **settings))


@torch.no_grad()
def test_a_cache_holds_what_the_vae_makes_of_each_image_and_its_mirror_image(cache, vae_folder):
    data, images = opened(cache), load_images(DataConfig(max_train_samples=50))
    vae, _ = load_vae(str(vae_folder))
    assert (len(data), data.channels, data.size, data.labels) == (50, 4, 4, images.labels)
    assert data.class_names == images.class_names
    for index in (0, 19, 20, 49):  # the ends of shards
        pixels = images[index]["images"].expand(3, -1, -1)
        posterior = vae.encode(torch.stack([pixels, pixels.flip(2)])).latent_dist
        item = data[index]
        torch.testing.assert_close(item["latents_mean"], posterior.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(item["latents_std"], posterior.std, rtol=1e-4, atol=1e-6)
        assert item["labels"] == images.labels[index]
    assert not torch.equal(data[0]["latents_mean"][1], data[0]["latents_mean"][0].flip(2))  # convolutions are not even


def test_float16_rounds_by_one_part_in_2048(cache, vae_folder, tmp_path):
    rounded, exact = opened(precompute(vae_folder, tmp_path / "half", "--dtype", "float16")), opened(cache)
    for index in range(50):
        for name in ("latents_mean", "latents_std"):
            assert rounded[index][name].dtype == torch.float16
            torch.testing.assert_close(rounded[index][name].float(), exact[index][name], rtol=2**-11, atol=2**-24)


def test_latents_of_a_network_are_scaled_samples_of_the_chosen_side():
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(3, 2, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)
    batch = {"latents_mean": mean, "latents_std": mean.abs() / 2, "labels": torch.arange(3)}
    scaling = LatentScaling(0.5, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=2.0)
    made = sampled(batch, torch.tensor([False, True, False]), noise, scaling)
    raw = torch.stack(
        [batch["latents_mean"][n, s] + batch["latents_std"][n, s] * noise[n] for n, s in enumerate((0, 1, 0))]
    )
    torch.testing.assert_close(scaling.decode(made["images"]), raw)
    assert made.keys() == {"images", "labels"}
    assert torch.equal(sampled(batch, None, noise, scaling)["images"][0], made["images"][0])


def test_a_run_that_was_killed_in_a_shard_is_ended_by_two_processes_with_the_files_of_one(cache, vae_folder, tmp_path):
    folder = tmp_path / "cache"
    arguments = ["--vae", vae_folder, "--output_dir", folder, *CACHE]
    killed = run(sys.executable, ROOT / "tests/data/kill_in_shard.py", *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = folder / "shard_00000-00000.safetensors"
    assert sorted(p.name for p in folder.glob("[!.]*")) == [first.name, "shard_00001-00000.safetensors.tmp"]
    with pytest.raises(InputError, match="it is not finished"):
        opened(folder)
    written = first.stat().st_mtime_ns
    done = run(*command("precompute_latents.py", *arguments, processes=2))
    assert done.stdout.count("Finished: 50 images") == 1
    assert first.stat().st_mtime_ns == written
    assert contents(folder) == contents(cache)


def photos(folder, count=23, broken=()):
    """Two Parquet files of small RGB images, some of them no images."""
    pixels = torch.randint(256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict(
        {"image": [image.numpy() for image in pixels], "label": [n % 2 for n in range(count)]}, features
    ).cast_column("image", datasets.Image(decode=False))
    no_image = {"image": {"bytes": b"no image", "path": None}}
    rows = rows.map(lambda row, n: no_image if n in broken else row, with_indices=True)
    for part in range(2):
        rows.shard(2, part).cast_column("image", datasets.Image()).to_parquet(folder / f"photos-{part}.parquet")
    return ["--data.name", "parquet", "--data.data_files", f"{folder}/*.parquet", "--data.image_size", 16,
            "--data.max_train_samples", "null", "--images_per_shard", 5]  # fmt: skip


def test_a_stream_is_encoded_as_the_table_of_its_files(vae_folder, tmp_path, capsys):
    arguments = photos(tmp_path, broken=[3, 20])
    table = opened(precompute(vae_folder, tmp_path / "table", *arguments), image_size=16)
    stream = opened(precompute(vae_folder, tmp_path / "stream", *arguments, "--data.streaming", "true"), image_size=16)
    assert "21 images, 2 more could not be read" in capsys.readouterr().out
    # The files' own shards, the last of each not full.
    assert [s.images + s.skipped for s in stream.manifest.shards] == [5, 5, 2, 5, 5, 1]
    assert len(table) == len(stream) == 21
    assert stream.labels == table.labels
    for index in range(21):
        torch.testing.assert_close(stream[index]["latents_mean"], table[index]["latents_mean"], rtol=1e-4, atol=1e-5)
    before = contents(stream.folder)
    (stream.folder / "shard_00000-00002.safetensors").unlink()
    (stream.folder / "latents.json").unlink()
    precompute(vae_folder, stream.folder, *arguments, "--data.streaming", "true")
    assert contents(stream.folder) == before
    with pytest.raises(InputError, match="2 images of parquet cannot be read, more than `data"):
        precompute(vae_folder, tmp_path / "strict", *arguments, "--data.max_corrupt_images", 1)


def shorten(folder):
    shard = folder / "shard_00001-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def edit(folder):
    file = folder / "latents.json"
    file.write_text(file.read_text().replace('"scaling_factor": 0.3', '"scaling_factor": 0.18215'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "shard_00001-00000.safetensors: the file has"),
        (
            lambda f: (f / "shard_00002-00000.safetensors").unlink(),
            "shard_00002-00000.safetensors: the file is missing",
        ),
        (
            lambda f: shutil.copy(f / "shard_00000-00000.safetensors", f / "shard_00001-00000.safetensors"),
            "the file holds other latents",
        ),
        (edit, "was changed after it was written"),
        (lambda f: (f / "latents.json").write_text("{}"), "it has no `format`"),
    ],
)
def test_a_damaged_cache_is_refused_and_mended_by_the_command_that_made_it(damage, words, damaged, cache, vae_folder):
    damage(damaged)
    with pytest.raises(InputError, match=words):
        opened(damaged)
    precompute(vae_folder, damaged)
    assert contents(damaged) == contents(cache)


def test_bits_that_changed_are_found_when_the_command_is_repeated(damaged, cache, vae_folder):
    shard = damaged / "shard_00001-00000.safetensors"
    with safe_open(shard, framework="pt") as file:
        assert file.get_slice("moments").get_shape() == [20, 2, 2, 4, 4, 4]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    precompute(vae_folder, damaged)
    assert contents(damaged) == contents(cache)


def test_a_cache_of_another_size_vae_or_scaling_is_refused(cache):
    with pytest.raises(InputError, match=r"`data.image_size` is 16, but the latent cache .* of 8×8 pixels"):
        opened(cache, image_size=16)
    data = opened(cache)
    data.check_vae(tiny_autoencoder(), -1.0, "the teacher's")
    other_decoder = tiny_autoencoder()
    other_decoder.decoder.load_state_dict(tiny_autoencoder(seed=1).decoder.state_dict())
    data.check_vae(other_decoder, -1.0, "the teacher's")  # the latents are the same
    with pytest.raises(InputError, match=r"made with another VAE, .* than the teacher's \(hash"):
        data.check_vae(tiny_autoencoder(seed=1), -1.0, "the teacher's")
    with pytest.raises(InputError, match=r"another scaling .*scaling_factor: 0.3 there, 0.5 here"):
        data.check_vae(tiny_autoencoder(scaling_factor=0.5), -1.0, "the teacher's")
    with pytest.raises(InputError, match=r"another scaling .*pixel_min: -1.0 there, 0.0 here"):
        data.check_vae(tiny_autoencoder(), 0.0, "the teacher's")


def test_workers_read_what_the_process_itself_reads_and_an_evaluation_asks_for_images(cache):
    data = opened(cache)
    alone, worker = data.batches(8), data.batches(8, num_workers=1)
    for _ in range(3):
        first, second = next(alone), next(worker)
        assert all(torch.equal(first[name], second[name]) for name in ("latents_mean", "latents_std", "labels"))
    with pytest.raises(InputError, match=r"is a cache of latents, and images are needed here: .* made from, digits\."):
        load_images(DataConfig(name=str(cache)))


def test_wrong_input_is_refused_before_anything_is_written(cache, vae_folder, tmp_path):
    before = contents(cache)
    with pytest.raises(InputError, match=r"made with other settings .*dtype: 'float32' then, 'float16' now"):
        precompute(vae_folder, cache, "--dtype", "float16")
    assert contents(cache) == before
    moved = shutil.copytree(cache, tmp_path / "moved")
    precompute(shutil.copytree(vae_folder, tmp_path / "vae"), moved)  # the same VAE elsewhere goes on
    assert (moved / "shard_00000-00000.safetensors").read_bytes() == before["shard_00000-00000.safetensors"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a\.txt, which is no part of a latent cache"):
        precompute(vae_folder, tmp_path / "notes")
    for arguments, words in (
        (["--vae", tmp_path / "nowhere"], "Cannot load the autoencoder"),
        (["--data.degradation", "blur"], "leave the references"),
        (["--data.name", "parquet", "--data.data_files", f"{tmp_path}/none.parquet"], "Cannot load the data set"),
    ):
        with pytest.raises(InputError, match=words):
            precompute(vae_folder, tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_a_dry_run_says_what_would_be_made(tmp_path, capsys):
    pipeline = tmp_path / "teacher"
    network, vae = tiny_sit(in_channels=4), tiny_autoencoder(levels=4)
    InterpolantPipeline(network, StochasticInterpolantScheduler(), vae, vae_pixel_min=0.0).save_pretrained(pipeline)
    assert load_vae(str(pipeline))[1] == 0.0
    arguments = ["--vae", pipeline, "--output_dir", tmp_path / "new", "--data.name", "ILSVRC/imagenet-1k"]

    def settings(size):
        return parse_settings(LatentsConfig, [str(a) for a in (*arguments, "--data.image_size", size)])

    print_dry_run(settings(256))
    printed = capsys.readouterr().out
    assert "4 × 32 × 32, mean and standard deviation, float16, of each image and its mirror image: 32 KiB" in printed
    assert "a million images take 30.5 GiB" in printed
    with pytest.raises(InputError, match="Take a multiple of 8"):
        print_dry_run(settings(100))
    assert not (tmp_path / "new").exists()


def test_the_manifest_says_what_the_latents_are(cache, vae_folder):
    values = json.loads((cache / "latents.json").read_text())
    assert (values["images"], values["skipped"], len(values["shards"])) == (50, 0, 3)
    recipe = values["recipe"]
    assert recipe["vae"]["name"] == str(vae_folder)
    assert recipe["data"]["image_size"] == 8
    assert recipe["scaling"]["scaling_factor"] == 0.3
    assert sum(p.stat().st_size for p in cache.glob("*.safetensors")) == sum(s["bytes"] for s in values["shards"])


GARBAGE = {
    "a list": lambda values: [],
    "no shards": lambda values: {**values, "shards": None},
    "a file elsewhere": lambda values: {**values, "shards": [{**values["shards"][0], "file": "../../secret"}]},
    "images of no number": lambda values: {**values, "shards": [{**values["shards"][0], "images": "20"}]},
    "two axes": lambda values: {**values, "recipe": {**values["recipe"], "latent_shape": [4, 4]}},
    "no size": lambda values: {**values, "recipe": {**values["recipe"], "data": {"name": "digits"}}},
    "names of numbers": lambda values: {**values, "class_names": [1, 2]},
    "a format in words": lambda values: {**values, "format": "one"},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_a_manifest_is_a_sentence(case, cache, tmp_path):
    """With the hash that belongs to it, which anybody can compute."""
    values = json.loads((cache / "latents.json").read_text())
    del values["hash"]
    values = GARBAGE[case](values)
    if isinstance(values, dict):
        values["hash"] = fingerprints.of_values(values)
    (tmp_path / "latents.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"latents\.json"):
        read_manifest(tmp_path)
