"""What people look for at the top of a repository: present, readable, and of this version."""

import re
from pathlib import Path

import pytest
import yaml

import si_distill

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PAPERS = (ROOT / "docs/papers.md").read_text(encoding="utf-8")


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


def test_the_project_has_one_address():
    addresses = set(re.findall(r"https://github\.com/si-distill/\w+", PROJECT))
    assert addresses == {yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"]}


def test_the_workflow_runs_every_python_that_is_promised():
    text = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)["jobs"]["test"]
    promised = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert job["strategy"]["matrix"]["python"] == promised
    assert f'requires-python = ">={promised[0]}"' in PROJECT
    assert {"python": promised[0], "versions": "lowest"} in job["strategy"]["matrix"]["include"]
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_the_space_asks_for_the_versions_of_the_package():
    wanted = (ROOT / "pipelines/space/requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', PROJECT))
    assert dict(line.split(">=") for line in wanted) == {
        line.split(">=")[0]: bounds[line.split(">=")[0]] for line in wanted
    }


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_page_is_in_the_navigation(page):
    assert f": {page}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_papers_of_model_cards_are_in_the_index():
    cited = re.findall(r"arXiv:(\d{4}\.\d{5})", (ROOT / "model_cards/references.bib").read_text(encoding="utf-8"))
    assert len(cited) > 10
    assert {f"https://arxiv.org/abs/{number}" for number in cited} == set(re.findall(r"https://arxiv[^)]+", PAPERS))


def test_the_index_of_papers_names_files_that_are_there():
    files = re.findall(r"`([a-z_0-9/]+\.py)`", PAPERS)
    configs = re.findall(r"`((?:bases|recipes|imagenet|cifar|digits|ffhq|celeba|fashion)[\w-]*/\w+)`", PAPERS)
    assert len(files) > 20
    assert len(configs) > 20
    assert [name for name in files if not (ROOT / "src/si_distill" / name).is_file()] == []
    assert [name for name in configs if not (ROOT / "configs" / f"{name}.yaml").is_file()] == []
