#!/usr/bin/env python
"""`si-distill likelihood` as a script of the repository, for `accelerate launch training/likelihood.py`."""

from si_distill.commands.likelihood import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
