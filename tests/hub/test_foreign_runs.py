"""Run folders that somebody else filled: what they say is text, what they link to is left alone, garbage is a sentence."""

import html
import json
import os
import re

import pytest
import yaml
from helpers import tiny_sit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_card import EVALUATION, run  # noqa: F401 - a fixture

from si_distill import OneStepInterpolantPipeline, StochasticInterpolantScheduler
from si_distill.errors import InputError
from si_distill.hub.card import GENERATED, TEMPLATES, is_own_text, render_card, write_card
from si_distill.hub.facts import read_facts
from si_distill.hub.plain_text import code, escaped, without_paths
from si_distill.hub.staging import check_links, stage_model, stage_space
from si_distill.interpolants import INTERPOLANTS

BAD = "<script>alert(1)</script> [x](javascript:alert(2)) `a` ![i](http://evil/i.png)\n# top\n```\n| cell"


def change(folder, name, **values):
    content = json.loads((folder / name).read_text())
    content.update(values)
    (folder / name).write_text(json.dumps(content))


def body(card) -> str:
    """The card without its blocks of code, which nobody renders."""
    return re.sub(r"^```\w*\n.*?^```$", "", card.text, flags=re.MULTILINE | re.DOTALL)


def test_names_are_text_in_the_card(run):  # noqa: F811
    teacher = {"name": BAD, "source": "hub", "revision": BAD, "network": {"class": BAD, "parameters": 7}}
    session = {"command": ["train.py", BAD], "hardware": BAD, "versions": {BAD: BAD}}
    data = {"name": BAD, "source": "hub", "split": BAD, "images": 3}
    change(run, "facts.json", teacher=teacher, data=data, sessions=[session])
    row = {**EVALUATION["rows"][1], "generator": BAD, "per class": {BAD: {"images": 3}}}
    evaluation = {
        "rows": [row],
        "class_balance": BAD,
        "device": BAD,
        "reference": {"name": BAD, "images": 3, "split": BAD},
    }
    change(run, "evaluation.json", **evaluation)
    change(run, "model_index.json", id2label={"0": BAD, "1": "ok"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"objective": BAD, "teacher": BAD, "lr_scheduler_type": BAD, "student": BAD, "output_dir": BAD}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = render_card(read_facts(run), repo_id="user/student")
    text = body(card)
    for active in ("<script", "](javascript", "![i]", "[x]", "\n# top"):
        assert active not in text, active
    assert len(re.findall("^```", card.text, re.MULTILINE)) % 2 == 0
    assert "&#60;script&#62;" in text
    assert "huggingface.co/<" not in text
    yaml.safe_load(card.content.split("---")[1])


def test_a_folder_cannot_write_code_into_the_lines_to_copy(run):  # noqa: F811
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": 'x"); import os; os.system("id'}))
    assert "os.system" not in render_card(read_facts(run)).text
    change(run, "facts.json", sessions=[{"command": ["a"], "processes": "1; rm -rf ~"}])
    with pytest.raises(InputError, match=r"facts.json: sessions\[0\].processes must be a whole number"):
        read_facts(run)


def test_machine_paths_are_cut_wherever_they_stand(run, tmp_path):  # noqa: F811
    here = str(tmp_path)
    change(run, "evaluation.json", class_balance=f"as in {here}/my data/set", student=f"{here}/student")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["rows"][1]["generator"] = f"student of {here}/runs/student, 1 step"
    evaluation["reference"] |= {"name": f"{here}/data", "files": [f"file://{here}/a.parquet", f"x={here}/b"]}
    evaluation["rows"][1]["made"] |= {"pipeline": f"{here}/student", f"{here}/key": 1}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    data = {"name": f"{here}/data", "source": "local", "split": "train[:80%]", "images": 3}
    command = [
        "train.py",
        f"--output_dir={here}/run",
        "--teacher",
        f"{here}/teacher",
        f"C:\\Users\\{os.path.basename(here)}\\x",
    ]
    change(run, "facts.json", data=data, sessions=[{"command": command}])
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "output_dir": f"{here}/run", "data": {"name": f"{here}/data"}})
    )
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 1, "images": 2, "images_per_second": 3, "note": f"from {here}/x"}) + "\n")
    staged = tmp_path / "staged"
    stage_model(OneStepInterpolantPipeline.from_pretrained(run), staged, "user/student", run)
    found = [
        path.name
        for path in staged.rglob("*")
        if path.is_file() and os.path.basename(here).encode() in path.read_bytes()
    ]
    assert not found
    assert "train[:80%]" in (staged / "facts.json").read_text()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/runs/student", "student"),
        ("~/runs/student/", "student"),
        ("as in /home/me/data (3)", "as in data (3)"),
        ("a=/home/me/x, b=~/y", "a=x, b=y"),
        ("file:///srv/data/a.parquet", "a.parquet"),
        (r"C:\Users\me\runs\student", "student"),
        ("https://huggingface.co/lab/sit", "https://huggingface.co/lab/sit"),
        ("lab/sit, 1/2 of it, m/s, runs/student", "lab/sit, 1/2 of it, m/s, runs/student"),
        ("train[:80%]", "train[:80%]"),
    ],
)
def test_paths_and_what_only_looks_like_one(text, left):
    assert without_paths({"a": [text]}) == {"a": [left]}


@given(st.text())
def test_escaped_text_has_no_active_character(text):
    shown = escaped(text)
    assert not set("<>[]`|*~$@\\\n\r\x1b\u202e") & set(shown)
    assert not re.search(r"_(\W|$)|://|www\.", shown)
    shown.encode()


@pytest.mark.parametrize(
    "text",
    [
        "**now** *a* _b_ __c__ _a__ __a_ _(a)_b _a_b_ ~~c~~ $d$ # e <b> [f](g) `h` \\*i\\* \\<b> &lt;",
        "https://evil.example, www.evil.example, someone@evil.example",
    ],
)
def test_escaped_text_is_rendered_as_it_was_written(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    for shown in (escaped(text), code(escaped(text))):
        rendered = markdown.render(f"| a |\n|---|\n| {shown} |\n")
        cell = re.search("<td>(.*)</td>", rendered)[1]
        assert html.unescape(re.sub("^<code>|</code>$", "", cell)) == text
    readable = "great white shark, 12:30, my_model, a-b, 50 %, _class_name, recall: of real ones"
    assert escaped(readable) == readable
    assert "_" not in escaped("_" * 10**6)  # in no time


def test_a_name_of_the_hub_is_linked_and_a_path_with_marks_is_code(run):  # noqa: F811
    change(run, "facts.json", teacher={"name": "lab/my_model_", "source": "hub"})
    assert "[lab/my_model&#95;](https://huggingface.co/lab/my_model&#95;)" in render_card(read_facts(run)).text
    session = {"command": ["train.py", "a\x1b[2J\u2028```"]}
    change(run, "facts.json", teacher={"name": "runs/my_*model", "source": "local"}, sessions=[session])
    change(run, "model_index.json", id2label={"0": "a\ud800\x1b"})
    write_card(run)
    assert (run / "README.md").read_text().replace("\n", "").isprintable()
    assert "<code>runs/my&#95;&#42;model</code>, a local folder" in render_card(read_facts(run)).text


def test_metadata_holds_names_and_no_other_text(run):  # noqa: F811
    change(run, "facts.json", data={"name": BAD, "source": "hub", "split": "train", "images": 3})
    change(run, "evaluation.json", reference={"name": "/home/me/my\n\x1bdata", "images": 3, "split": "~/a/b"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "objective": BAD}))
    change(run / "scheduler", "scheduler_config.json", interpolant=BAD)
    data = render_card(read_facts(run), repo_id="user/student").data
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("my data", "my data", "b")
    assert data.datasets is None
    assert all(re.fullmatch(r"[\w-]+", tag) for tag in data.tags)


def test_a_path_of_the_users_may_cite_what_nobody_here_knows(run, monkeypatch):  # noqa: F811
    known = (TEMPLATES / "references.bib").read_text()
    assert all(f"{{{path.citation}," in known for path in INTERPOLANTS.values() if path.citation)
    monkeypatch.setattr(INTERPOLANTS["linear"], "citation", "me2026power")
    text = render_card(read_facts(run)).text
    assert "kornilov2025realuid" in text
    assert "lipman2023flow" not in text


# Links.


def test_links_that_lead_out_of_the_folder_are_refused(run, tmp_path):  # noqa: F811
    pipeline = OneStepInterpolantPipeline.from_pretrained(run)
    secret = tmp_path / "secret"
    secret.write_text('{"token": "hf_secret"}')
    for name in (
        "README.md",
        "config.yaml",
        "facts.json",
        "evaluation.json",
        "metrics.jsonl",
        "transformer/config.json",
    ):
        kept = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
        with pytest.raises(InputError, match=rf"{name} is a link to .*secret, outside of .*, and is not published"):
            stage_model(pipeline, tmp_path / "staged", "user/student", run)
        assert not (tmp_path / "staged").exists()
        (run / name).unlink()
        if kept is not None:
            (run / name).write_bytes(kept)
    (run / "README.md").symlink_to("notes.txt")  # inside: left behind like the file that it leads to
    (run / "notes.txt").write_text("my notes")
    stage_model(pipeline, tmp_path / "staged", "user/student", run)
    assert GENERATED in (tmp_path / "staged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("place", "blob", "published"),
    [
        (f"models--user--student/snapshots/{'a1' * 20}", "models--user--student/blobs/b1", True),
        (f"models--user--student/snapshots/{'a1' * 20}", "models--user--student/refs/b1", False),
        (f"models--user--student/snapshots/{'a1' * 20}", "models--user--other/blobs/b1", False),
        ("models--user--student/snapshots/model", "models--user--student/blobs/b1", False),
        (f"student/snapshots/{'a1' * 20}", "student/blobs/b1", False),
        ("snapshots/student", ".ssh/id_rsa", False),
    ],
)
def test_links_of_the_hubs_cache_and_no_others_lead_out(run, tmp_path, place, blob, published):  # noqa: F811
    folder, target = tmp_path / "home" / place, tmp_path / "home" / blob
    target.parent.mkdir(parents=True)
    target.write_text("a text")
    folder.parent.mkdir(parents=True)
    run.rename(folder)
    (folder / "README.md").symlink_to(os.path.relpath(target, folder))
    assert is_own_text(folder) == place.startswith("models--user--student/snapshots/a1")
    if published:
        check_links(folder)
        target.unlink()
        target.symlink_to(tmp_path)  # a blob that is a link itself
    with pytest.raises(InputError, match=r"README.md is a link to .*, and is not published"):
        check_links(folder)


def _stage(pipeline, run):  # noqa: F811
    stage_model(pipeline, run / "hub" / "model", "user/student", run)
    stage_space(run / "hub" / "space", "user/student", "user/student", None, None)


@pytest.mark.parametrize("link", ["hub", "hub/model", "hub/space"])
def test_nothing_is_deleted_or_written_behind_a_link(run, tmp_path, link):  # noqa: F811
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    (elsewhere / "model" / "thesis.txt").write_text("years of work")
    (elsewhere / "space").mkdir()
    (elsewhere / "thesis.txt").write_text("years of work")
    before = sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*"))
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(elsewhere)
    pipeline = OneStepInterpolantPipeline.from_pretrained(run)
    with pytest.raises(InputError, match=r"is a link to .*(remove|Remove) the link"):
        _stage(pipeline, run)
    assert sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*")) == before


def test_a_card_that_is_a_link_is_left_alone(run, tmp_path):  # noqa: F811
    (run / "README.md").symlink_to(tmp_path / "not there")
    write_card(run)
    assert not (tmp_path / "not there").exists()


# Garbage.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FILES = ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "facts.json", "evaluation.json",
         "metrics.jsonl", "config.yaml"]  # fmt: skip


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "student"
    OneStepInterpolantPipeline(tiny_sit(num_classes=10), StochasticInterpolantScheduler()).save_pretrained(folder)
    session = {"command": ["a"], "hardware": "b", "processes": 2, "versions": {"torch": "1"}}
    teacher = {"name": "a/b", "source": "hub", "revision": "c", "network": {"class": "d", "parameters": 7}}
    facts = {"teacher": teacher, "data": {"name": "a", "source": "b", "split": "c", "images": 3}, "sessions": [session]}
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "metrics.jsonl").write_text('{"step": 100, "images": 100, "images_per_second": 10}\n')
    values = {"objective": "sid", "adversarial": {"kind": "none"}, "data": {"name": "a", "split": "b"}, "learning_rate": 0.1,
              "max_steps": 3, "ema_decay": 0.9, "teacher": "t", "guidance_scale": 1.0}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@given(st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrong_values_anywhere_are_a_card_or_a_sentence(one_run, data):
    file = one_run / data.draw(st.sampled_from(FILES))
    whole = file.read_text()
    content = yaml.safe_load(whole)
    path = data.draw(st.sampled_from(list(places(content))))
    value = data.draw(JSON)
    if path:
        at = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    file.write_text(json.dumps(content if path else value))
    try:
        render_card(read_facts(one_run), repo_id="user/student")
    except InputError as error:
        assert str(one_run) in str(error)  # noqa: PT017
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("name", FILES)
def test_what_is_too_large_or_not_even_text_is_a_sentence(one_run, name):
    whole = (one_run / name).read_bytes()
    try:
        for content in (b"\xff\xfe\x00", b"[" * 100_000, b'{"a": "' + b"x" * 2**20 * 65 + b'"}'):
            (one_run / name).write_bytes(content)
            if name == "metrics.jsonl" and len(content) < 10:  # a line cut off
                continue
            with pytest.raises(InputError, match=re.escape(name)):
                read_facts(one_run)
    finally:
        (one_run / name).write_bytes(whole)


def test_latents_without_an_autoencoder_are_not_published_as_pictures(tmp_path):
    student = OneStepInterpolantPipeline(tiny_sit(in_channels=4), StochasticInterpolantScheduler())
    with pytest.raises(InputError, match=r"images for the card cannot be made: .*there is no VAE to decode them"):
        stage_model(student, tmp_path / "hub", "user/name")
