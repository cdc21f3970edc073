"""Names of predictions and of network times, and how an object is built from its name.

It imports nothing but Python: a copy travels next to the scheduler into every saved pipeline.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

PREDICTIONS = ("velocity", "sample", "epsilon", "score", "v_prediction", "edm")
#: What number a network is given for the time t (see `Interpolant.network_time`).
TIMESTEP_TYPES = ("time", "discrete", "log_sigma")


def build_named(
    known: Mapping[str, Callable[..., Any]],
    kind: str,
    name: str,
    settings: Mapping[str, Any],
    setting: str = "setting",
    also: tuple[str, ...] = (),
) -> Any:
    """`known[name](**settings)`, with errors for the user.

    Args:
        known: what can be built: an interpolant, an objective, a degradation.
        kind, setting: what to call one of these and one of its settings.
        name, settings: as the user gave them.
        also: settings that the caller takes out before, to be listed too.

    Raises ValueError for an unknown name, settings that it does not have, or values of another type.
    """
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}. Choose one of: {', '.join(known)}.")
    accepted = list(inspect.signature(known[name]).parameters)
    for given in settings:
        if given not in accepted:
            has = f"it {'takes' if also else 'has'} {', '.join([*accepted, *also]) or 'none at all'}"
            raise ValueError(f"The {kind} {name!r} has no {setting} `{given}`; {has}.")
    try:
        return known[name](**settings)
    except TypeError as error:
        raise ValueError(f"The {setting}s of the {kind} {name!r} must be numbers, got {settings}: {error}.") from None
