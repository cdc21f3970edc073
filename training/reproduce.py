#!/usr/bin/env python
"""`si-distill reproduce` as a script of the repository."""

from si_distill.commands.reproduce import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
