"""`si-distill COMMAND --key value …`: one module of this package for each command."""

import difflib
import importlib
import pkgutil

from ..errors import InputError
from ..settings import script_main
from . import __name__ as package
from . import __path__ as folders

USAGE = """si-distill COMMAND --key value …: one-step students of diffusion, flow and bridge models.

{}

`si-distill COMMAND --help` lists a command's settings. On several processes: accelerate launch -m {}.COMMAND, with _
for the - of its name.
"""


def commands() -> dict[str, str]:
    """Command → module."""
    names = (module.name for module in pkgutil.iter_modules(folders) if module.name != "__main__")
    return {name.replace("_", "-"): f"{package}.{name}" for name in names}


def main(argv: list[str]) -> None:
    """Runs the command that the first word names with the others.

    Raises:
        InputError: when there is no such command.
    """
    known = commands()
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, known))
        pages = {name: importlib.import_module(module).__doc__ or "" for name, module in known.items()}
        lines = [f"  {name:<{width}}  {page.partition(chr(10))[0]}" for name, page in pages.items()]
        return print(USAGE.format("\n".join(lines), package), end="")
    if name == "--version":
        from .. import __version__

        return print(__version__)
    if name not in known:
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Choose one of: {', '.join(known)}."
        raise InputError(f"`si-distill` has no command {name!r}. {hint}")
    importlib.import_module(known[name]).main(arguments)


def run() -> None:
    """The console command."""
    script_main(main)


if __name__ == "__main__":
    run()
