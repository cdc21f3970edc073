#!/usr/bin/env python
"""`si-distill export-ema` as a script of the repository, for `accelerate launch training/export_ema.py`."""

from si_distill.commands.export_ema import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
