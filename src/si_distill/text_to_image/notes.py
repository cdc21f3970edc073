"""What a user should know and need not act on."""

import os
import sys


def note(text: str) -> None:
    """Says something on standard error, once per run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
