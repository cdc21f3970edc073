"""Any command line and any config file: settings, or a sentence; text comes out as it went in."""

import contextlib
import dataclasses
import io
import math
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from si_distill.data.config import DataConfig
from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.reading import Plain, dump_yaml, parse_yaml, resolve
from si_distill.settings import parse_settings, setting, settings_from_dict, settings_to_dict

bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=10)


@dataclasses.dataclass
class Settings:
    name: str = setting("", "Text.")
    other: str | None = setting(None, "Text or nothing.")
    count: int = setting(1, "A whole number.")
    rate: float | None = setting(None, "A number.")
    flag: bool = setting(False, "A boolean.")
    names: list[str] = setting([], "Texts.")
    rates: list[float] = setting([], "Numbers.")
    extra: dict = setting({}, "Anything.")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


NAMES = [
    "name",
    "other",
    "count",
    "rate",
    "flag",
    "names",
    "rates",
    "extra",
    "extra.deep",
    "data",
    "data.name",
    "nothing",
]


def outcome(parse, *arguments):
    """The settings, or None where they are refused by a sentence (or `-h` is asked for); any other error is a failure."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), contextlib.suppress(InputError, SystemExit):
        return parse(*arguments)


def assert_sound(found):
    """Each value has the type of its setting and is finite."""
    assert type(found.name) is str
    assert type(found.count) is int
    assert type(found.flag) is bool
    assert found.rate is None or (type(found.rate) is float and math.isfinite(found.rate))
    assert all(type(name) is str for name in found.names)
    assert all(type(rate) is float and math.isfinite(rate) for rate in found.rates)
    assert "Plain" not in str(type(found.extra.get("deep")))


@bounded
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(text, max_size=3))))
def test_any_command_line_gives_sound_settings_or_a_sentence(pairs):
    argv = [word for name, words in pairs for word in (f"--{name}", *words)]
    found = outcome(parse_settings, Settings, argv)
    if found is not None:
        assert_sound(found)


@bounded
@given(content=st.binary() | text.map(str.encode) | values.map(lambda value: yaml.safe_dump(value).encode()))
def test_any_file_gives_sound_settings_or_a_sentence(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    outcome(parse_settings, Settings, ["--config", str(tmp_path / "c.yaml")])


@bounded
@given(st.dictionaries(st.sampled_from(NAMES), values))
def test_any_values_give_sound_settings_or_a_sentence(given_values):
    found = outcome(settings_from_dict, Settings, given_values)
    if found is not None:
        assert_sound(found)


@bounded
@given(text)
def test_text_comes_out_as_it_went_in(word):
    if word != "~" and not word.startswith("~/"):
        assert parse_settings(Settings, [f"--name={word}"]).name == word
        assert settings_from_dict(Settings, {"names": [Plain(word)]}).names == [word]


@bounded
@given(st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_numbers_come_out_as_they_went_in(whole, number):
    found = parse_settings(Settings, [f"--count={whole:+d}", f"--rate={number!r}", f"--rates={number:e}"])
    assert (found.count, found.rate, found.rates) == (whole, number, [float(f"{number:e}")])


@bounded
@given(st.dictionaries(text, values.filter(lambda value: "nan" not in repr(value))))
def test_what_is_written_is_what_is_read(written):
    assert resolve(parse_yaml(dump_yaml(written))) == written
    assert yaml.safe_load(dump_yaml(written)) == written


@pytest.mark.parametrize("cls", [Settings, DataConfig])
@bounded
@given(data=st.data())
def test_settings_survive_config_yaml(tmp_path, cls, data):
    names = data.draw(st.dictionaries(st.sampled_from(["name", "other", "split"]), text))
    found = outcome(settings_from_dict, cls, {key: value for key, value in names.items() if hasattr(cls(), key)})
    (tmp_path / "c.yaml").write_text(dump_yaml(settings_to_dict(found)), encoding="utf-8")
    assert parse_settings(cls, ["--config", str(tmp_path / "c.yaml")]) == found


@bounded
@given(st.lists(text, max_size=4))
def test_a_shipped_script_answers_any_words_with_settings_or_a_sentence(words):
    outcome(parse_settings, EvaluationConfig, ["--pipeline", "p", *words])
