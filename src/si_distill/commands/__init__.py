"""The modules of this package are the commands of `si-distill`; each also runs by `python -m` or `accelerate launch -m`."""
