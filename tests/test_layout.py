"""The house: which room may import which, and what must not wait for torch."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from si_distill import choices, critic
from si_distill.data import degradations

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "si_distill"
SCRIPTS = [path for folder in ("training", "pipelines") for path in sorted((ROOT / folder).glob("*.py"))]
#: Rooms from the ground up; a room imports those before its own line, and its own. Functions' imports count.
FLOORS = (
    ("errors", "units", "choices", "fingerprints", "lazy", "sample_noise", "tables", "visualization", "workers"),
    ("reading", "files", "imports", "named_configs", "places"),
    ("schedulers", "models", "settings", "launching", "adversarial"),
    ("plot",),
    ("interpolants", "pipelines"),
    ("objectives", "log_variance", "autoencoders", "sampling"),
    ("critic", "data", "conversion"),
    ("text_to_image",),
    ("loading",),
    ("evaluation",),
    ("hub",),
    ("training",),
    ("commands",),
)


def imported(path: Path) -> set[str]:
    """The rooms of the package that a module names in imports, those inside functions too."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            full = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            full = [part for part in full if part]
            found |= {full[0]} if full else {alias.name for alias in node.names}
    return found - {"__version__"}


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_room_imports_the_floors_below_it(floor):
    below = {room for rooms in FLOORS[:floor] for room in rooms}
    for room in FLOORS[floor]:
        single = SOURCE / f"{room}.py"
        for path in [single] if single.exists() else (SOURCE / room).rglob("*.py"):
            too_high = imported(path) - below - {room}
            assert not too_high, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(too_high))}"


def test_every_room_has_a_floor():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms - {"__init__"} == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("argument", ["--help", "--no_such_setting=1"])
def test_help_and_a_mistyped_setting_do_not_wait_for_torch(script, argument):
    without = "import sys, runpy; sys.modules['torch'] = sys.modules['numpy'] = None; sys.argv = sys.argv[1:]; "
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", without + run, str(script), argument]
    result = subprocess.run(command, capture_output=True, text=True)
    code, text = (0, result.stdout) if argument == "--help" else (2, result.stderr)
    assert result.returncode == code, result.stderr
    assert ("--config" if code == 0 else "Unknown setting `no_such_setting`") in text


def test_importing_the_package_does_not_import_torch():
    code = "import sys, si_distill; assert 'torch' not in sys.modules; si_distill.get_objective('sid')"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["", ".data", ".models", ".pipelines"])
def test_lazy_names_are_there(name):
    package = importlib.import_module(f"si_distill{name}")
    assert all(getattr(package, public) is not None and public in dir(package) for public in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_the_names_of_choices_are_those_of_the_code():
    assert choices.DEGRADATIONS == tuple(degradations.DEGRADATIONS)
    assert choices.ADVERSARIAL_HEADS == tuple(critic.HEADS)
