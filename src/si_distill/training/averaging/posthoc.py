"""Averages of any length after training, from stored averages of two lengths.

A power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3)
weighs the weights of update τ by the profile p(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t]. Snapshots of such averages at several
times are linear in the weights, so a combination of them whose profile comes close to another one is close to that average.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import InputError
from ...reading import parse_json

#: Folder of the power averages' snapshots in a run.
EMA_SNAPSHOTS = "ema_snapshots"
#: σ_rel of γ = 0, the plain mean of all updates; a negative γ would weigh old weights more than new ones.
LARGEST_SIGMA_REL = 12**-0.5
#: A combination that misses more of the wanted profile's norm than this is another average, not an approximation.
LARGEST_FIT_ERROR = 0.25

_FILE = re.compile(r"step_(\d+)-sigma_(.+)\.safetensors")


def power_exponent(sigma_rel: float) -> float:
    """The γ of a profile whose standard deviation is `sigma_rel` times the training's length.

    p is the pdf of t·Beta(γ+1, 1), so σ_rel = (γ+1)^½ (γ+2)^−1 (γ+3)^−½: a cubic in γ, of which the largest root is the one
    that rises with time.

    Raises:
        InputError: for a value outside (0, 12^−½].
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise InputError(
            f"σ_rel must lie in (0, {LARGEST_SIGMA_REL:.4f}], got {sigma_rel}: above it an average would weigh old weights "
            "more than new ones. 0.05 and 0.1 are usual."
        )
    inverse = sigma_rel**-2
    return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)


def fit_profile(
    exponents: Sequence[float], times: Sequence[float], exponent: float, time: float
) -> tuple[np.ndarray, float]:
    """Combines stored profiles into a wanted one: least squares of ∫(Σ x_i p_i − p)² dτ with Σ x_i = 1, in float64.

    Inner products have a closed form: ⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1)/(γ_a+γ_b+1) · (m/t_a)^γ_a (m/t_b)^γ_b m/(t_a t_b) with
    m = min(t_a, t_b). The sum is held at 1, unlike in the paper, so that weights that stand still are reproduced.

    Args:
        exponents: γ_i of the stored profiles (n,).
        times: their t_i (n,), in any unit.
        exponent: γ of the wanted profile.
        time: its t, in the same unit.

    Returns:
        The coefficients x (n,), and the error ‖Σ x_i p_i − p‖ / ‖p‖.
    """
    g, t = np.asarray(exponents, np.float64), np.asarray(times, np.float64) / time
    norms = np.sqrt(_inner_product(g, t, g, t))  # normalised profiles keep the equations well conditioned
    gram = _inner_product(g[:, None], t[:, None], g, t) / (norms[:, None] * norms)
    wanted = _inner_product(g, t, exponent, 1.0) / norms
    square = _inner_product(exponent, 1.0, exponent, 1.0)
    sums = 1 / norms
    equations = np.block([[gram, sums[:, None]], [sums, np.zeros(1)]])
    solution = np.linalg.lstsq(equations, np.append(wanted, 1.0), rcond=None)[0][:-1]
    error = max(solution @ gram @ solution - 2 * solution @ wanted + square, 0.0) / square
    return solution / norms, float(error**0.5)


def _inner_product(exponent_a, time_a, exponent_b, time_b):
    low = np.minimum(time_a, time_b)
    overlap = (low / time_a) ** exponent_a * (low / time_b) ** exponent_b * low / (time_a * time_b)
    return (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1) * overlap


class Snapshots:
    """The `ema_snapshots/` folder of a run: one safetensors file per stored average and step.

    Tensors stay in float32: a student moves little from its teacher, and half precision would round away much of what tells
    its averages apart; a combination amplifies that rounding.

    Args:
        folder: the folder; need not exist.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def files(self) -> dict[tuple[float, int], Path]:
        """The stored files by (σ_rel, step)."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            match = _FILE.fullmatch(path.name)
            if match:
                found[float(match[2]), int(match[1])] = path
        return found

    def write(self, weights: dict[str, torch.Tensor], buffers: Sequence[str], sigma_rel: float, step: int) -> None:
        """Stores an average; `buffers` names the tensors of `weights` that are copies and not averages."""
        path = self.folder / f"step_{step:08d}-sigma_{sigma_rel!r}.safetensors"
        write_weights(path, weights, {"buffers": json.dumps(sorted(buffers))})

    def forget_after(self, step: int) -> None:
        """Deletes what a resumed run is about to write again, and files whose writing was cut off."""
        for (_, stored), path in self.files().items():
            if stored > step:
                path.unlink()
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()


def write_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial, metadata)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def reconstruct(snapshots: Snapshots, sigma_rel: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """The power-function average of any length at a step that has snapshots: a state dict on the CPU.

    All snapshots up to that step are combined (`fit_profile`); they are read one after the other and summed in float64.
    Buffers are those of the step itself. A length that is stored is read, not fitted.

    Args:
        snapshots: those of one run.
        sigma_rel: the length, as the standard deviation of the profile relative to `step`.
        step: where the average ends; the last step with snapshots when not given.

    Raises:
        InputError: when there are no snapshots or none at `step`, a file is damaged, or `sigma_rel` is outside (0, 12^−½] or
            too far from what was stored.
    """
    exponent = power_exponent(sigma_rel)
    stored = snapshots.files()
    if not stored:
        raise InputError(
            f"{snapshots.folder} holds no snapshots. Train with `ema_power_sigmas`, e.g. --ema_power_sigmas 0.05 0.1."
        )
    steps = sorted({stored_step for _, stored_step in stored})
    step = steps[-1] if step is None else step
    if step not in steps:
        near = ", ".join(map(str, sorted(steps, key=lambda other: abs(other - step))[:3]))
        raise InputError(
            f"There is no snapshot of step {step} in {snapshots.folder}: its {len(steps)} steps lie between {steps[0]} and "
            f"{steps[-1]}. Choose one of them, e.g. {near}."
        )
    if (sigma_rel, step) in stored:
        return _combine([stored[sigma_rel, step]], np.ones(1))
    used = sorted((key for key in stored if key[1] <= step), key=lambda key: key[1])  # the last is of `step`
    coefficients, error = fit_profile([power_exponent(s) for s, _ in used], [n for _, n in used], exponent, step)
    if error > LARGEST_FIT_ERROR:
        lengths = ", ".join(f"{s:g}" for s in sorted({s for s, _ in used}))
        raise InputError(
            f"An average of σ_rel {sigma_rel:g} cannot be made at step {step}: the closest combination of the {len(used)} "
            f"snapshots up to it (σ_rel {lengths}) misses its profile by {error:.0%}. Choose a σ_rel nearer to those, a "
            "later step, or train with a smaller `ema_snapshot_steps`."
        )
    return _combine([stored[key] for key in used], coefficients)


def _combine(files: Sequence[Path], coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """Σ x_i θ_i over the files; buffers from the last."""
    total: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for path, coefficient in zip(files, coefficients.tolist(), strict=True):
        try:
            with safe_open(path, framework="pt") as file:
                buffers = set(parse_json((file.metadata() or {})["buffers"], [str]))
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"The snapshot {path} is damaged ({type(error).__name__}: {error}). Copy it again, or delete it to "
                "reconstruct from the others."
            ) from error
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        shapes = shapes or found
        if found != shapes:
            raise InputError(
                f"The snapshot {path} holds other tensors than {files[0].name}: they are of different networks. Keep the "
                "snapshots of one run in the folder."
            )
        for name, tensor in weights.items():
            if name in buffers:
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor.double(), alpha=coefficient)
            else:
                total[name] = tensor.double() * coefficient
    return {name: tensor.to(shapes[name][1]) for name, tensor in total.items()}
