"""What both notebooks need: the repository's scripts in the kernel, and user-facing errors as one sentence."""

import contextlib
import io
import runpy
import shlex
from pathlib import Path

from IPython import get_ipython
from IPython.display import Image as Picture
from IPython.display import Markdown, display
from PIL import Image

from si_distill.errors import InputError, TrainingStopped

ROOT = Path(__file__).resolve().parent.parent


def script(path: str, *arguments: object, quiet: bool = False, **settings: object) -> None:
    """Runs a script of the repository in this kernel and prints the command that does the same in a shell.

    Args:
        path: below the repository.
        arguments: words of the command line.
        quiet: whether to leave out what it prints; its progress stays.
        settings: further `--name value` pairs, several values for a list.
    """
    words = [str(word) for word in arguments]
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    print("$ accelerate launch", shlex.join([path, *words]), "\n", flush=True)
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        runpy.run_path(str(ROOT / path))["main"](words)


def show(image: Image.Image | str | Path) -> None:
    """Displays a picture, or a picture file, at most 1,000 pixels wide: what a notebook shows is stored in it."""
    shown = image if isinstance(image, Image.Image) else Image.open(image)
    shown.thumbnail((1000, 1000))
    file = io.BytesIO()
    shown.save(file, "PNG", optimize=True)
    display(Picture(file.getvalue()))


def say(text: str) -> None:
    """Displays a paragraph of Markdown."""
    display(Markdown(text))


def _sentence(shell, kind, error, trace, tb_offset=None) -> list[str]:
    lines = [f"{'stopped' if kind is TrainingStopped else 'error'}: {error}"]
    shell._showtraceback(kind, error, lines)
    return lines


# A cell that fails for a reason that its reader can mend shows that reason, and no traceback.
get_ipython().set_custom_exc((InputError, TrainingStopped), _sentence)
