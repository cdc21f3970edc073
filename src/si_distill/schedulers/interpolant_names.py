"""Names of predictions and of network times.

It imports nothing: a copy travels beside the scheduler into every saved pipeline.
"""

PREDICTIONS = ("velocity", "sample", "epsilon", "score", "v_prediction", "edm")
#: What number a network is given for the time t (see `Interpolant.network_time`).
TIMESTEP_TYPES = ("time", "discrete", "log_sigma")
