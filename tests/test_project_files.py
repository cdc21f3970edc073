"""What people look for at the top of a repository: present, readable, and of this version."""

from pathlib import Path

import yaml

import si_distill

ROOT = Path(__file__).parent.parent


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == si_distill.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_the_changes_begin_with_what_is_next_and_know_this_version():
    titles = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]
    assert titles[0] in ("## Unreleased", f"## {si_distill.__version__}")
    assert f"## {si_distill.__version__}" in titles
