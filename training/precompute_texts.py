#!/usr/bin/env python
"""`si-distill precompute-texts` as a script of the repository, for `accelerate launch training/precompute_texts.py`."""

from si_distill.commands.precompute_texts import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
