#!/usr/bin/env python
"""`si-distill compare` as a script of the repository."""

from si_distill.commands.compare import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
