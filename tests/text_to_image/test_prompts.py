"""Prompts of data sets and files: where they are found, how they are encoded, and what is refused."""

import datasets
import pytest
import torch
from tiny_pipelines import ALL, build

from si_distill.data import DataConfig
from si_distill.errors import InputError
from si_distill.text_to_image.config import TextConfig
from si_distill.text_to_image.conventions import CONVENTIONS
from si_distill.text_to_image.prompts import load_texts, read_prompts
from si_distill.text_to_image.texts import EncodedRows, encode_texts

CPU = torch.device("cpu")
PROMPTS = ["a red fox in the snow", "two boats", "two boats", "a cat on a mat, and a dog that looks at it", "7"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return DataConfig(name="text", data_files=str(path))


def limited(name, **settings):
    return TextConfig(**({} if name in ("sd15", "sdxl") else {"max_length": 256}), **settings)


def table(folder, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(folder / "prompts.parquet")
    return {"name": "parquet", "data_files": str(folder / "prompts.parquet")}


def same(one, other):
    assert one.text.keys() == other.text.keys()
    return all(torch.equal(value, other.text[name]) for name, value in one.text.items())


def test_prompts_of_a_file_and_of_a_table_are_found(file, tmp_path):
    assert read_prompts(file) == PROMPTS
    assert read_prompts(DataConfig(name="text", data_files=file.data_files, max_train_samples=2)) == PROMPTS[:2]
    data = table(tmp_path, text=PROMPTS, label=list(range(5)))
    assert read_prompts(DataConfig(**data)) == PROMPTS
    assert read_prompts(DataConfig(**data, streaming=True, max_train_samples=3)) == PROMPTS[:3]
    data = table(tmp_path, url=["u"] * 5, caption=PROMPTS)
    assert read_prompts(DataConfig(**data, caption_column="caption")) == PROMPTS


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        ({"text": PROMPTS}, {"caption_column": "prompt"}, r"no column 'prompt'; its columns are \['text'\]"),
        ({"url": PROMPTS, "text": PROMPTS}, {}, r"More than one column of text .* set `data.caption_column`"),
        ({"label": [1, 2]}, {}, r"No column of text among \['label'\]"),
        ({"text": [["a", "b"]], "url": ["u"]}, {"caption_column": "text"}, "not one text in each row: .* to 'url'"),
        ({"text": ["a", " ", "b", None, "c"]}, {}, r"Prompts 2, 4 of 5 are empty \(2 in all\)"),
        ({"text": ["a", ""]}, {}, r"Prompt 2 of 2 is empty"),
        ({"text": PROMPTS}, {"streaming": True}, "set `data.max_train_samples`"),
        ({"text": PROMPTS}, {"data_files": "none.parquet"}, "Cannot load the data set"),
        ({"text": PROMPTS}, {"name": "digits"}, "images without captions"),
    ],
)
def test_prompts_that_cannot_be_read(columns, settings, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_prompts(DataConfig(**{**table(tmp_path, **columns), **settings}))


@pytest.mark.parametrize("name", ALL)
def test_a_text_is_the_same_in_any_company_from_memory_and_from_the_encoders(name, file):
    pipeline = build(name)
    held = load_texts(file, limited(name), pipeline, CPU)
    drawn = load_texts(file, limited(name, max_texts_in_memory=3), pipeline, CPU)
    assert isinstance(drawn.source, EncodedRows)
    assert held.prompts == drawn.prompts == PROMPTS
    assert same(held.null, drawn.null)
    together = held.condition(torch.arange(5))
    for rows in ([1, 3], [4, 0, 2]):
        rows = torch.tensor(rows)
        assert same(held.condition(rows), together[rows])
        assert same(drawn.condition(rows), together[rows])
    # The longest text decides the width, which was found without encoding it.
    mask = held.convention.mask
    assert mask is None or together.text[mask].sum(1).max() == together.text[mask].shape[1]


def test_texts_that_were_just_asked_for_are_not_encoded_again(file):
    pipeline, calls = build("sd15"), []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    texts = load_texts(file, TextConfig(max_texts_in_memory=0), pipeline, CPU)
    rows, before = torch.tensor([0, 1, 2]), len(calls)
    first = texts.condition(rows)
    assert len(calls) == before + 2  # of three, two are the same
    assert same(texts.condition(rows.flip(0)), first[torch.tensor([2, 1, 0])])
    assert texts.null.text["encoder_hidden_states"].shape[0] == 1
    assert len(calls) == before + 2
    texts.to(CPU)
    assert same(texts.condition(rows), first)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "lumina2", "sd15"])
def test_prompts_are_called_cut_where_their_end_is_not_seen(name, tmp_path, capsys):
    pipeline, settings = build(name), limited(name)
    reading = CONVENTIONS[type(pipeline).__name__].readings[-1]
    limit = reading.limit(pipeline, settings.max_length)
    whole = "a" * (limit + 1 - reading.count(pipeline, ["a"])[0])
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([whole, f"{whole[:-1]}b", f"{whole}c", f"{whole}d"]) + "\n")
    texts = load_texts(DataConfig(name="text", data_files=str(path)), settings, pipeline, CPU)
    found = [texts.condition(torch.tensor([row])) for row in range(4)]
    assert not same(found[0], found[1])
    assert same(found[2], found[3])
    notes = [line for line in capsys.readouterr().err.splitlines() if f"`{reading.tokenizer}`" in line]
    assert len(notes) == 1  # and none of the pipeline's own for each text
    assert "2 of 4 prompts are cut" in notes[0]
    assert f"more than {limit} tokens (prompt 3 has {limit + 1})" in notes[0]


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("sd15", 64, "a StableDiffusionPipeline always takes 77 tokens"),
        ("sd3", 513, "takes at most 512 tokens"),
        ("flux", 513, "takes at most 512 tokens"),
        ("qwen", 1025, "takes at most 1024 tokens"),
        ("lumina2", 300, "takes at most 299 tokens"),
        ("z_image", 481, "takes at most 480 tokens"),
        ("lumina2", 100, "what a Lumina2Pipeline puts around a prompt takes"),
    ],
)
def test_a_length_that_the_pipeline_does_not_take(name, length, words, file):
    with pytest.raises(InputError, match=words):
        load_texts(file, TextConfig(max_length=length), build(name), CPU)


def test_settings_that_no_pipeline_takes():
    for settings, words in (
        ({"max_length": 0}, "`text.max_length` must be at least 1"),
        ({"max_length": 5000}, "`text.max_length` must be at most 4,096"),
        ({"height": 64}, "give both"),
        ({"height": 64, "width": 0}, "`text.width` must be at least 1"),
        ({"told_guidance": 0.0}, "`text.told_guidance` must be a positive number"),
    ):
        with pytest.raises(InputError, match=words):
            TextConfig(**settings)


def test_only_a_guidance_distilled_network_is_told_a_scale(file, capsys):
    pipeline, rows = build("flux"), torch.tensor([1, 0])
    texts = load_texts(file, TextConfig(), pipeline, CPU)
    assert "it is told the scale 3.5" in capsys.readouterr().err
    assert texts.condition(rows).guidance.tolist() == [3.5, 3.5]
    texts = load_texts(file, TextConfig(told_guidance=2.0), pipeline, CPU)
    assert (texts.condition(rows).guidance.tolist(), texts.null.guidance.tolist()) == ([2.0, 2.0], [2.0])
    pipeline.transformer.register_to_config(guidance_embeds=False)  # as in FLUX.1-schnell
    assert load_texts(file, TextConfig(), pipeline, CPU).condition(rows).guidance is None
    for other in (pipeline, build("sd15")):
        with pytest.raises(InputError, match="is told no scale: leave it out"):
            load_texts(file, TextConfig(told_guidance=2.0), other, CPU)


def test_an_empty_negative_prompt_of_qwen_image_is_a_space(file, capsys):
    pipeline = build("qwen")
    null = load_texts(file, TextConfig(), pipeline, CPU).null
    assert "an empty negative prompt is ' '" in capsys.readouterr().err
    assert same(null, encode_texts(pipeline, PROMPTS, negative_prompt=" ").null)
    assert not same(null, encode_texts(pipeline, PROMPTS, negative_prompt="").null)


def test_a_pipeline_without_encoders_needs_a_cache(file):
    pipeline = build("sd15")
    pipeline.register_modules(text_encoder=None)
    with pytest.raises(InputError, match="was loaded without text encoders, which these prompts need"):
        load_texts(file, TextConfig(), pipeline, CPU)


def test_texts_in_another_order_are_not_encoded_again(file):
    pipeline = build("lumina2")
    texts = load_texts(file, TextConfig(), pipeline, CPU)
    pipeline.text_encoder = None
    renumbered = texts.renumbered([PROMPTS[4], PROMPTS[0]])
    assert same(renumbered.condition(torch.arange(3)), texts.condition(torch.tensor([4, 0, len(texts)])))
    assert renumbered.hash != texts.hash
