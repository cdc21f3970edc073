#!/usr/bin/env python
"""`si-distill convert-teacher` as a script of the repository, for `accelerate launch training/convert_teacher.py`."""

from si_distill.commands.convert_teacher import main
from si_distill.settings import script_main

if __name__ == "__main__":
    script_main(main)
