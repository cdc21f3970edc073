"""What MkDocs is told besides mkdocs.yml: pages from files outside docs/, links to such files, and the help of the commands.

Links stay as they are in the repository, where they work on GitHub too.
"""

import contextlib
import importlib
import io
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

from si_distill.commands.__main__ import commands

ROOT = Path(__file__).parents[2]
#: Pages of the site that are files at the top of the repository.
TOP = {
    f"{name.lower()}.md": f"{name}.md"
    for name in ("CONTRIBUTING", "RELEASING", "SECURITY", "CHANGELOG", "CODE_OF_CONDUCT")
}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
HELP = "<!-- the help of every command -->"
#: A type as diffusers' docstrings write it: [`Class`], `dict`, *optional*.
TYPE = re.compile(r"<code>[^<]*`.*?</code>")


def on_files(files, config):
    """Adds the pages of `TOP`."""
    for page, source in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns each link to a file of the repository into one to its page, or to GitHub where it has none."""
    source = TOP.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {top: name for name, top in TOP.items()} | {f"docs/{uri}": uri for uri in files.src_uris}

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if target in pages:
            url = os.path.relpath(pages[target], posixpath.dirname(page.file.src_uri) or ".")
        elif (ROOT / target).exists() and not target.startswith("docs/"):
            url = f"{config.repo_url}/blob/main/{target}"
        else:
            return link[0]  # which the strict build refuses
        return f"{link[1]}{url}{link[3]}"

    return LINK.sub(moved, markdown).replace(HELP, _help() if HELP in markdown else "")


def on_page_content(html, page, config, files):
    """Shows types in docstrings without the marks that only Markdown would read."""
    return TYPE.sub(lambda found: re.sub(r"\[`|`\]|`|\*(?=optional)|(?<=optional)\*", "", found[0]), html)


def _help() -> str:
    sections = []
    for name, module in commands().items():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            importlib.import_module(module).main(["--help"])
        sections.append(f"## `{name}`\n\n```text\n{shown.getvalue().strip()}\n```\n")
    return "\n".join(sections)
