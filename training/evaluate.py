#!/usr/bin/env python
"""`si-distill evaluate` as a script of the repository, for `accelerate launch training/evaluate.py`."""

from si_distill.commands.evaluate import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
