#!/usr/bin/env python
"""`si-distill precompute-latents` as a script of the repository, for `accelerate launch training/precompute_latents.py`."""

from si_distill.commands.precompute_latents import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
