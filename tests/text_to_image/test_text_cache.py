"""Caches of embeddings: what they hold, how they are made again after a kill, and what is refused."""

import json
import shutil
import signal
import sys

import pytest
import torch
from script_runs import ROOT, command, run
from tiny_pipelines import ALL, build

from si_distill import fingerprints
from si_distill.commands.precompute_texts import main
from si_distill.data import DataConfig
from si_distill.data.latents.format import is_latent_cache
from si_distill.errors import InputError
from si_distill.text_to_image.config import TextConfig
from si_distill.text_to_image.prompts import load_texts
from si_distill.text_to_image.teacher import load_stock_pipeline
from si_distill.text_to_image.text_cache import TextCache, encoder_hash, is_text_cache, without_encoders
from si_distill.text_to_image.texts import encoders

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "two boats", "a cat on a mat", "two boats", "7", "a larger dog", "trees", "füße", "a red fox"]


def precompute(teacher, folder, prompts, *arguments, limit=256):
    """Makes a cache in this process, as the script does."""
    argv = ["--teacher", teacher, "--texts_dir", folder, "--data.name", "text", "--data.data_files", prompts]
    argv += ["--texts_per_shard", 3, "--dtype", "float32", *([] if limit is None else ["--text.max_length", limit])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the scripts in tests have it: with others, sums are rounded otherwise
    try:
        main(list(map(str, [*argv, *arguments])))
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    build("z_image").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(teacher, prompts, tmp_path_factory):
    return precompute(teacher, tmp_path_factory.mktemp("texts") / "cache", prompts)


@pytest.fixture
def damaged(cache, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(cache, tmp_path / "cache")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def opened(folder, teacher, **settings):
    """The texts of a cache for a pipeline without its encoders."""
    pipeline = load_stock_pipeline(str(teacher), **without_encoders(str(teacher)))
    assert not encoders(pipeline)
    data = DataConfig(name=str(folder), max_train_samples=settings.pop("count", None))
    return load_texts(data, TextConfig(**{"max_length": 256, **settings}), pipeline, CPU)


def same(one, other):
    assert one.text.keys() == other.text.keys()
    return all(torch.equal(value, other.text[name]) for name, value in one.text.items())


@pytest.mark.parametrize("name", ALL)
def test_the_embeddings_of_a_cache_are_those_of_the_encoders(name, prompts, tmp_path, capsys):
    limit = None if name in ("sd15", "sdxl") else 256
    build(name).save_pretrained(tmp_path / "teacher")
    folder = precompute(tmp_path / "teacher", tmp_path / "cache", prompts, limit=limit)
    cached = opened(folder, tmp_path / "teacher", max_length=limit)
    assert cached.prompts == PROMPTS
    assert len(cached.source._places) == len(set(PROMPTS)) + 1
    data = DataConfig(name="text", data_files=str(prompts))
    encoded = load_texts(data, TextConfig(max_length=limit), load_stock_pipeline(str(tmp_path / "teacher")), CPU)
    for rows in (torch.arange(9), torch.tensor([7, 2])):
        assert same(cached.condition(rows), encoded.condition(rows))
    assert same(cached.null, encoded.null)
    assert "is not checked" not in capsys.readouterr().err


def test_the_first_texts_of_a_cache_are_as_wide_as_the_longest_of_them(cache, teacher, prompts):
    data = DataConfig(name="text", data_files=str(prompts), max_train_samples=2)
    encoded = load_texts(data, TextConfig(max_length=256), load_stock_pipeline(str(teacher)), CPU)
    few, all_texts, rows = opened(cache, teacher, count=2), opened(cache, teacher), torch.tensor([1, 0])
    assert same(few.condition(rows), encoded.condition(rows))
    assert few.width < all_texts.width


def test_a_run_that_was_killed_in_a_shard_is_ended_by_two_processes_with_the_files_of_one(
    cache, teacher, prompts, tmp_path
):
    folder = tmp_path / "cache"
    arguments = ["--teacher", teacher, "--texts_dir", folder, "--data.name", "text", "--data.data_files", prompts]
    arguments += ["--texts_per_shard", 3, "--dtype", "float32", "--text.max_length", 256]
    killed = run(sys.executable, ROOT / "tests/text_to_image/kill_in_shard.py", *arguments, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = folder / "texts_00000.safetensors"
    assert sorted(path.name for path in folder.glob("[!.]*")) == [first.name, "texts_00001.safetensors.tmp"]
    assert is_text_cache(str(folder))
    with pytest.raises(InputError, match="it is not finished"):
        opened(folder, teacher)
    written = first.stat().st_mtime_ns
    done = run(*command("precompute_texts.py", *arguments, processes=2))
    assert done.stdout.count("Finished: 9 texts") == 1
    assert first.stat().st_mtime_ns == written
    assert contents(folder) == contents(cache)


def shorten(folder):
    shard = folder / "texts_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])


def edit(folder):
    file = folder / "texts.json"
    file.write_text(file.read_text().replace('"max_length": 256', '"max_length": 128'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, r"texts_00001\.safetensors has"),
        (lambda folder: (folder / "texts_00002.safetensors").unlink(), r"texts_00002\.safetensors is missing"),
        (
            lambda folder: shutil.copy(folder / "texts_00000.safetensors", folder / "texts_00001.safetensors"),
            "is damaged: texts_00001",
        ),
        (lambda folder: (folder / "prompts.safetensors").write_bytes(b"none"), "is damaged"),
        (edit, "was changed after it was written"),
        (lambda folder: (folder / "texts.json").write_text("{}"), "it has no `format`"),
    ],
)
def test_a_damaged_cache_is_refused_and_mended_by_the_command_that_made_it(
    damage, words, damaged, cache, teacher, prompts
):
    damage(damaged)
    with pytest.raises(InputError, match=words):
        TextCache(damaged)
    if words.startswith("is damaged: texts"):
        (
            damaged / "texts_00001.safetensors"
        ).unlink()  # whole, but of other texts: nothing that was made is overwritten
    precompute(teacher, damaged, prompts)
    assert contents(damaged) == contents(cache)


def test_bits_that_changed_are_found_when_the_command_is_repeated(damaged, cache, teacher, prompts):
    shard = damaged / "texts_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    precompute(teacher, damaged, prompts)
    assert contents(damaged) == contents(cache)


def test_a_cache_of_other_encoders_or_settings_is_refused(cache, teacher, tmp_path, capsys):
    with pytest.raises(InputError, match=r"other settings \(text.max_length: 256 there, 128 here\)"):
        opened(cache, teacher, max_length=128)
    with pytest.raises(InputError, match=r"text.max_length: 256 there, 512 here"):
        load_texts(DataConfig(name=str(cache)), TextConfig(), load_stock_pipeline(str(teacher)), CPU)
    with pytest.raises(InputError, match=r"text.negative_prompt: '' there, 'ugly' here"):
        opened(cache, teacher, negative_prompt="ugly")
    with pytest.raises(InputError, match=r"pipeline: 'ZImagePipeline' there, 'StableDiffusionPipeline' here"):
        load_texts(DataConfig(name=str(cache)), TextConfig(), build("sd15"), CPU)
    assert same(opened(cache, shutil.copytree(teacher, tmp_path / "moved")).null, opened(cache, teacher).null)
    other = build("z_image")
    torch.nn.init.normal_(other.text_encoder.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"made with other text encoders, those of .* \(hash .*\), than .*/other has"):
        opened(cache, tmp_path / "other")
    other = build("z_image")
    torch.nn.init.normal_(other.transformer.layers[0].attention.to_q.weight)
    other.save_pretrained(tmp_path / "fine-tuned")  # the network alone
    assert encoder_hash(str(tmp_path / "fine-tuned")) == encoder_hash(str(teacher))
    assert same(opened(cache, tmp_path / "fine-tuned").null, opened(cache, teacher).null)
    assert "is not checked" not in capsys.readouterr().err
    load_texts(DataConfig(name=str(cache)), TextConfig(max_length=256), other, CPU)  # was never saved as a whole
    assert "is not checked" in capsys.readouterr().err


def test_wrong_input_is_refused_before_anything_is_written(cache, teacher, prompts, tmp_path):
    before = contents(cache)
    with pytest.raises(InputError, match=r"made with other settings .*max_length: 256 then, 128 now"):
        precompute(teacher, cache, prompts, limit=128)
    more = tmp_path / "more.txt"
    more.write_text("\n".join(["another one", *PROMPTS]))
    with pytest.raises(InputError, match=r"embeddings of other texts \(texts_00000.safetensors\)"):
        precompute(teacher, cache, more)
    with pytest.raises(InputError, match="a cache of embeddings already"):
        precompute(teacher, tmp_path / "new", prompts, "--data.name", cache)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a\.txt, which is no part of a text cache"):
        precompute(teacher, tmp_path / "notes", prompts)
    for arguments, words in (
        (["--teacher", tmp_path / "notes"], "give one of the text-to-image pipelines known here"),
        (["--data.data_files", tmp_path / "none.txt"], "Cannot load the data set"),
        (["--data.caption_column", "caption"], "no column 'caption'"),
        (["--text.max_length", 481], "takes at most 480 tokens"),
        (["--texts_dir", more], "is a file, not a folder"),
        (["--texts_dir", ""], "Give --teacher"),
        (["--text.max_lengths", 3], "Unknown setting `text.max_lengths`"),
    ):
        with pytest.raises(InputError, match=words):
            precompute(teacher, tmp_path / "new", prompts, *arguments)
    assert not (tmp_path / "new").exists()
    assert contents(cache) == before
    assert not is_latent_cache(str(cache))


def test_a_config_of_a_distillation_says_which_texts(cache, teacher, prompts, tmp_path):
    config = tmp_path / "distill.yaml"
    config.write_text(
        f"teacher: {teacher}\nobjective: sid\nlearning_rate: 1e-5\noutput_dir: {tmp_path}/run\n"
        f"data: {{name: text, data_files: {prompts}}}\ntext: {{max_length: 256}}\n"
    )
    main(["--config", str(config), "--texts_dir", f"{tmp_path}/cache", "--dtype", "float32", "--texts_per_shard", "3"])
    assert contents(tmp_path / "cache").keys() == contents(cache).keys()
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="Unknown setting `objectiv`"):
        main(["--config", str(config), "--texts_dir", f"{tmp_path}/cache", "--objectiv", "sid"])


GARBAGE = {
    "a list": lambda values: [],
    "no shards": lambda values: {**values, "shards": None},
    "a file elsewhere": lambda values: {**values, "shards": [{**values["shards"][0], "file": "../../secret"}]},
    "texts of no number": lambda values: {**values, "shards": [{**values["shards"][0], "texts": "3"}]},
    "a recipe of more": lambda values: {**values, "recipe": {**values["recipe"], "more": 1}},
    "fewer texts": lambda values: {**values, "shards": values["shards"][:1]},
    "a format in words": lambda values: {**values, "format": "one"},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_a_manifest_is_a_sentence(case, damaged):
    """With the hash that belongs to it, which anybody can compute."""
    values = json.loads((damaged / "texts.json").read_text())
    del values["hash"]
    values = GARBAGE[case](values)
    if isinstance(values, dict):
        values["hash"] = fingerprints.of_values(values)
    (damaged / "texts.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"texts\.json|the text cache|The text cache"):
        TextCache(damaged)
