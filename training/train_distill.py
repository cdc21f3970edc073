#!/usr/bin/env python
"""`si-distill train-distill` as a script of the repository, for `accelerate launch training/train_distill.py`."""

from si_distill.commands.train_distill import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
