#!/usr/bin/env python
"""`si-distill generate` as a script of the repository, for `accelerate launch pipelines/generate.py`."""

from si_distill.commands.generate import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
