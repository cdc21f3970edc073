"""Draws the curves of one or several runs on one page: `python -m si_distill.plot`."""

from ..plot import main
from ..settings import script_main

if __name__ == "__main__":
    script_main(main)
