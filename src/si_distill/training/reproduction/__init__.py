"""A published recipe from checkpoint to table: `training/reproduce.py`."""
