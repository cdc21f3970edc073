#!/usr/bin/env python
"""`si-distill publish` as a script of the repository, for `accelerate launch pipelines/publish.py`."""

from si_distill.commands.publish import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
