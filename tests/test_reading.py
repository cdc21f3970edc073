"""JSON and YAML of others: YAML 1.2's meaning, limits before expansion, and a sentence for everything else."""

import os

import pytest
import yaml

from si_distill.errors import InputError
from si_distill.reading import dump_yaml, read_json, read_json_lines, read_yaml


def written(path, text):
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("no", "no"), ("On", "On"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("010", 10), ("0o17", 15), ("0x1F", 31), ("-7", -7), ("1_000", "1_000"), ("12:30", "12:30"),
        ("1e-4", 1e-4), ("1.0e2", 100.0), (".5", 0.5), ("5.", 5.0), ("2026-11-30", "2026-11-30"), ("<<", "<<"),
        ('"010"', "010"), ("'true'", "true"), ("1e", "1e"), ("infinity", "infinity"),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(tmp_path, text, value):
    found = read_yaml(written(tmp_path / "c.yaml", f"key: {text}\nlist: [{text}]\n"))
    assert found["key"] == value
    assert type(found["key"]) is type(value)
    assert found["list"] == ([] if text == "" else [value])


def test_what_is_written_is_read_again_by_any_reader(tmp_path):
    texts = [
        "010",
        "no",
        "1e-4",
        "0o17",
        "12:30",
        "~",
        "",
        "# x",
        "a: b",
        " x",
        "1_000",
        "é",
        "<<",
        "2026-11-30",
        "1.0e2",
    ]
    values = {"texts": texts, "numbers": [1, 1e-05, -0.5, True, None], "deep": {"a": {"b": []}}, "12:30": "x"}
    file = written(tmp_path / "c.yaml", dump_yaml(values))
    assert read_yaml(file) == values
    assert yaml.safe_load(file.read_text()) == values


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max_steps: 3\nmax_steps: 7\n", "`max_steps` appears twice (line 2"),
        ("data: {name: a, 'name': b}\n", "`name` appears twice"),
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]\n", "deeper than 40 levels"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not read"),
        ("a: !!binary aGk=\n", "tags are not read"),
        ("[a]: 1\n", "a key must be text"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("#" * 2**20 + "\n", "larger than"),
        (b"\xff\xfe\x00", "utf-8"),
        ("- a\n", "must hold `key: value` lines, but it holds a list"),
        ("# nothing\n", "must hold `key: value` lines, but it holds nothing"),
    ],
)
def test_a_config_file_that_is_no_mapping_of_reasonable_size_is_refused(tmp_path, content, words):
    with pytest.raises(InputError) as caught:
        read_yaml(written(tmp_path / "c.yaml", content))
    assert words in str(caught.value)


def test_references_of_a_reasonable_size_are_read(tmp_path):
    assert read_yaml(written(tmp_path / "c.yaml", "a: &a [1, 2]\nb: *a\n")) == {"a": [1, 2], "b": [1, 2]}


SHAPE = {"step": int, "rate": float, "files": {str: {"size": int, "hash?": str}}, "best": (dict, None), "names": [str]}
WHOLE = '{"step": 1, "rate": 2, "files": {"a": {"size": 3}}, "best": null, "names": ["x"], "new": 1}'


def test_json_of_the_right_shape_is_read(tmp_path):
    assert read_json(written(tmp_path / "a.json", WHOLE), SHAPE)["new"] == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WHOLE.replace('"step": 1', '"step": true'), "step must be a whole number, got True"),
        (WHOLE.replace('"size": 3', '"size": "3"'), "files.a.size must be a whole number, got '3'"),
        (WHOLE.replace('{"size": 3}', "[]"), "files.a must be a mapping, got []"),
        (WHOLE.replace('["x"]', "[1]"), "names[0] must be text, got 1"),
        (WHOLE.replace('"names"', '"nams"'), "it has no `names`"),
        (WHOLE.replace("null", "7"), "best must be a mapping, got 7"),
        ("[1]", "it must be a mapping, got [1]"),
        ('{"step": 1, "step": 2}', "a key twice"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
    ],
)
def test_json_of_another_shape_is_a_sentence_with_the_place(tmp_path, content, words):
    with pytest.raises(InputError) as caught:
        read_json(written(tmp_path / "a.json", content), SHAPE)
    assert words in str(caught.value)
    assert "a.json" in str(caught.value)


def test_a_missing_file_and_a_folder_are_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=f"Cannot read {path}"):
            read_json(path)


def test_only_a_last_line_may_be_cut_off(tmp_path):
    for tail in ('{"step": 3, "lo', "\0" * 50):
        file = written(tmp_path / "m.jsonl", '{"step": 1}\n{"step": 2}\n' + tail)
        assert [line["step"] for line in read_json_lines(file, {"step": int})] == [1, 2]
    for line in ('{"step": "x"}', "7", '{"step": 3, "lo\n{"step": 4}'):
        file = written(tmp_path / "m.jsonl", f'{{"step": 1}}\n{line}\n')
        with pytest.raises(InputError, match=r"m\.jsonl, line 2"):
            list(read_json_lines(file, {"step": int}))
    with pytest.raises(InputError, match="it is no file"):
        list(read_json_lines(tmp_path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    for read in (read_yaml, read_json):
        with pytest.raises(InputError, match="it is not a file"):
            read(tmp_path / "c.yaml")
