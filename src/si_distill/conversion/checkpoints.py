"""Reading of foreign PyTorch checkpoints, without executing anything that they hold, and comparison of their tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError
from ..places import similar_paths
from .pickles import read_torch_file, reason_of
from .shown import printable, some

StateDict = dict[str, torch.Tensor]
#: Types of weights that become float32 and mean the same.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Where training scripts keep weights, in order of preference: averages first, teachers before students.
WEIGHTS = ("ema", "ema_model", "ema_models", "model", "net_model", "ema_gens", "gen")
#: What wrappers put before the names of a network's tensors: of distributed training, `torch.compile`, Lightning.
WRAPPERS = ("module", "_orig_mod", "model", "net", "network")
#: Those of them that are one-step students.
STUDENTS = ("ema_gens", "gen")
#: Those of them that hold one network for each decay of an average.
SEVERAL = ("ema_models", "ema_gens")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds: tensors in plain containers, and a record of the `argparse.Namespace` that scripts save.

    Raises:
        InputError: when it is missing, cut short, no checkpoint, or holds objects whose loading would run code.
    """
    if not path.is_file():
        raise InputError(f"There is no checkpoint file {path}.{similar_paths(path)}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except MemoryError as error:
        raise InputError(
            f"Cannot read {path} ({path.stat().st_size:,} bytes): {reason_of(error)}. Free some, or use a larger machine."
        ) from error
    except SafetensorError as error:
        raise InputError(f"Cannot read {path}: {reason_of(error)}.") from error
    except Exception as error:  # a file that is no checkpoint fails in any of the ways a parser can
        foreign = re.search(r"would use (\S+)\. ", str(error))
        if foreign:
            raise InputError(
                f"{path} holds more than tensors: loading it would call {foreign[1]}. That is refused, because it can run "
                "any code. Save the state dictionary alone, where the file comes from."
            ) from error
        raise InputError(
            f"{path} cannot be read as a PyTorch checkpoint ({reason_of(error)}). It was cut short, or is something else: "
            f"it has {path.stat().st_size} bytes; compare that with the original."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the dictionary of a checkpoint.")
    if {"student", "cfg_scale"} <= content.keys():
        raise InputError(
            f"{path} is a one-step student of si-adistill. Its network was trained so that its raw velocity is the image, "
            "which is neither a prediction on an interpolant nor the one-step map x1 − v of this library, so it cannot be "
            "converted. Convert the SiT teacher that it came from and distill again."
        )
    return content


def choose_weights(content: dict[str, Any], which: str | None, ema_decay: str | None) -> tuple[str, StateDict]:
    """The state dictionary in a checkpoint.

    Args:
        content: what `read_checkpoint` gave.
        which: a name of `WEIGHTS`, or None for the first that is there.
        ema_decay: which network of `SEVERAL`, as it is named there.

    Returns:
        Where it was (`""` for a file that is a state dictionary itself, otherwise e.g. `"ema_gens 0.9999"`), and its
        tensors, without what wrappers put before their names.

    Raises:
        InputError: when there is no such entry, or several and none was chosen.
    """
    content = _without_lightning(content)
    there = [name for name in WEIGHTS if isinstance(content.get(name), dict)]
    if which is not None and which not in there:
        raise InputError(f"The checkpoint has no {which!r}. {_what_is_there(content, there)}")
    if not there:
        if ema_decay is not None:
            raise InputError(f"`ema_decay` is {ema_decay}, but there are no averages. {_what_is_there(content, there)}")
        return "", _tensors(content, "The checkpoint")
    name = which or there[0]
    weights, place = content[name], name
    if name not in SEVERAL and ema_decay is not None:
        raise InputError(
            f"`ema_decay` is {ema_decay}, but {name!r} is a single network. {_what_is_there(content, there)}"
        )
    if name in SEVERAL:
        decays = [str(key) for key in weights]
        if ema_decay is None and len(decays) > 1:
            raise InputError(f"{name!r} holds averages of the decays {some(decays, 9)}: choose one with --ema_decay.")
        decay = decays[0] if ema_decay is None and decays else ema_decay
        if decay not in decays:
            raise InputError(f"{name!r} has no average of decay {decay}. It has: {some(decays, 9) or 'none'}.")
        weights, place = weights[list(weights)[decays.index(decay)]], f"{name} {printable(decay)}"
    return place, _tensors(weights, f"The entry {place!r}")


def _what_is_there(content: dict[str, Any], there: list[str]) -> str:
    if there:
        return f"It has: {', '.join(there)}."
    return f"It is a state dictionary itself or no checkpoint of a known form; it begins with {some(content)}."


def _tensors(weights: Any, what: str) -> StateDict:
    if not isinstance(weights, dict) or not weights or not all(torch.is_tensor(value) for value in weights.values()):
        keys = f" It begins with {some(weights)}." if isinstance(weights, dict) and weights else ""
        raise InputError(f"{what} is no state dictionary, a mapping of names to tensors.{keys}")
    found = {
        str(name): tensor for name, tensor in weights.items() if name != "n_averaged"
    }  # a count of `AveragedModel`
    while found and len(firsts := {name.split(".")[0] for name in found}) == 1 and firsts <= set(WRAPPERS):
        found = {name.partition(".")[2]: tensor for name, tensor in found.items()}
    return found


def _without_lightning(content: dict[str, Any]) -> dict[str, Any]:
    """Lightning keeps all networks in one `state_dict`, each below the name that it has in its module."""
    together = content.get("state_dict")
    if not isinstance(together, dict):
        return content
    groups: dict[str, dict[str, Any]] = {}
    for name, value in together.items():
        first, _, rest = str(name).partition(".")
        groups.setdefault(first, {})[rest] = value
    return {name: group for name, group in groups.items() if name in WEIGHTS} or together


def find_tensor(weights: StateDict, name: str, ndim: int, what: str) -> torch.Tensor:
    """A tensor whose shape tells the structure of the network.

    Args:
        weights: the checkpoint's tensors.
        name: of the tensor.
        ndim: number of its axes.
        what: what the checkpoint was taken for, for the error.

    Raises:
        InputError: when it is missing or has other axes.
    """
    if name not in weights or weights[name].ndim != ndim:
        found = f"is {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise InputError(f"The checkpoint was taken for {what}, but its tensor {name} with {ndim} axes {found}.")
    return weights[name]


#: A checkpoint's name of each tensor → ours; a fused tensor is several of ours, one after the other along the first axis.
Layout = Mapping[str, tuple[str, ...]]


def check_tensors(found: StateDict, layout: Layout, network: torch.nn.Module, what: str) -> None:
    """Compares the tensors of a checkpoint with those that a network of ours needs.

    Args:
        found: the checkpoint's.
        layout: what the checkpoint calls the network's tensors.
        network: ours, on any device.
        what: what the checkpoint was taken for, for the error.

    Raises:
        InputError: names what is missing, left over or of another shape, a few of each.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    ours, expected = network.state_dict(), {}
    for name, parts in layout.items():
        first = tuple(ours[parts[0]].shape)
        expected[name] = (sum(ours[part].shape[0] for part in parts), *first[1:]) if len(parts) > 1 else first
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    left_over = [f"{name} {shape}" for name, shape in shapes.items() if name not in expected]
    wrong = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    types = [f"{name} is {str(t.dtype).removeprefix('torch.')}" for name, t in found.items() if t.dtype not in DTYPES]
    problems = [
        f"{len(names)} {kind}: {some(names)}"
        for names, kind in (
            (missing, "missing"),
            (left_over, "not part of it"),
            (wrong, "of another shape"),
            (types, "of a type that is not read"),
        )
        if names
    ]
    if problems:
        raise InputError(f"The checkpoint was taken for {what}, but its tensors differ. {'; '.join(problems)}.")
    # A sum, for a copy of the weights would be made to look at each; only damaged ones overflow it.
    damaged = [name for name, tensor in found.items() if not tensor.sum(dtype=torch.float64).isfinite()]
    if damaged:
        raise InputError(
            f"The checkpoint's weights are damaged: {len(damaged)} tensors are not finite: {some(damaged)}."
        )
