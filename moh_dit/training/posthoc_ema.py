"""Compute weight averages of any width after a run (EDM2, arXiv 2312.02696, §3.2).

    moh-dit ema runs/mine --std 0.08
    moh-dit sample runs/mine --weights ema-posthoc-0.08 ...

A snapshot is a known average of the weights up to its step t, with profile p(τ) ∝ τ^γ for τ ≤ t. A
linear combination of snapshots has the same combination of profiles. The combination whose profile
is nearest to the requested one, in the least-squares sense, approximates the requested average.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fid_eval.progress import progress_bar

from ..checkpoints.runs import WEIGHTS, checkpoint_name, checkpoint_step
from ..common.atomic_write import atomic_output
from ..common.errors import UserError
from ..common.manifest import verify_folder
from ..model.transformer import MoHDiTTransformer2DModel
from .config import PosthocConfig
from .ema import power_gamma


@dataclass(frozen=True)
class Profile:
    """The profile of a power-function average: step τ ≤ ``step`` has a weight ∝ τ^γ."""

    step: int
    std: float

    @property
    def gamma(self) -> float:
        """Return the exponent γ."""
        return power_gamma(self.std)


def inner_product(a: Profile, b: Profile) -> float:
    """Return ∫ p_a(τ) p_b(τ) dτ of two profiles with integral 1 (EDM2, appendix C)."""
    if a.step > b.step:
        a, b = b, a
    # p(τ) = (γ + 1) τ^γ / t^(γ + 1) for τ ≤ t, so the product is 0 after the smaller t.
    ratio = (a.step / b.step) ** b.gamma
    return (a.gamma + 1) * (b.gamma + 1) * ratio / ((a.gamma + b.gamma + 1) * b.step)


def fit_coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Fit the profile ``wanted`` by a linear combination of the stored profiles.

    Returns:
        float64 coefficients, one per stored profile, and the relative error
        ‖p - p_wanted‖ / ‖p_wanted‖ of the combined profile p.
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    scale = np.diag(gram) ** -0.5  # normalise the profiles for a well-conditioned system
    solution = np.linalg.lstsq(gram * np.outer(scale, scale), target * scale, rcond=1e-14)[0]
    coefficients = solution * scale
    norm = inner_product(wanted, wanted)
    square = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(square, 0.0) / norm))


def list_snapshots(run: Path) -> dict[Profile, Path]:
    """Return the profile and the file of each snapshot of a run.

    Raises:
        UserError: the run has no snapshots.
    """
    found = {}
    for file in sorted((run / "snapshots").glob(f"step-*/ema-power-*/{WEIGHTS}")):
        std = float(re.sub("^ema-power-", "", file.parent.name))
        found[Profile(checkpoint_step(file.parent.parent), std)] = file
    if not found:
        raise UserError(f"run {run} has no snapshots; train with --ema_power_stds '[0.05, 0.1]'")
    return found


def combine_weights(files: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ c_i w_i over the weights in safetensors files, summed in float64, as float32."""
    handles = []
    for file in files:
        try:
            handles.append(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"snapshot {file} cannot be read: {error}") from None
    combined = {}
    names = sorted(handles[0].keys())
    with progress_bar(len(names), desc="combining", unit="tensor") as bar:
        for name in names:
            total: Tensor | None = None
            for handle, coefficient in zip(handles, coefficients, strict=True):
                term = coefficient * handle.get_tensor(name).double()
                total = term if total is None else total.add_(term)
            assert total is not None
            combined[name] = total.float()
            bar.update()
    return combined


def reconstruct(config: PosthocConfig) -> None:
    """Compute the requested average and write it as a model folder.

    Raises:
        UserError: the run has no snapshots, no suitable checkpoint, or the output exists.
    """
    run = Path(config.run)
    snapshots = list_snapshots(run)
    steps = sorted({profile.step for profile in snapshots})
    saved = [s for s in steps if (run / "checkpoints" / checkpoint_name(s)).is_dir()]
    if config.step is None and not (saved or config.output):
        raise UserError(f"no checkpoint of {run} has a snapshot at the same step; give --output")
    step = config.step or (saved[-1] if saved and not config.output else steps[-1])
    if not 1 <= step <= steps[-1]:
        raise UserError(f"step is {step}, but the last snapshot of {run} is at step {steps[-1]}")
    if config.output is None and step not in saved:
        raise UserError(f"{run} has no checkpoint at step {step}; give --output")
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    output = Path(config.output) if config.output else checkpoint / f"ema-posthoc-{config.std:g}"
    if output.exists():
        raise UserError(f"{output} exists; remove it, or choose another --output")

    if not config.no_verify:
        for folder in sorted((run / "snapshots").glob("step-*")):
            verify_folder(folder)
    # Later snapshots are included: they contain the earlier steps as well.
    coefficients, error = fit_coefficients(list(snapshots), Profile(step, config.std))
    weights = combine_weights(list(snapshots.values()), coefficients.tolist())
    first = next(iter(snapshots.values()))
    with safe_open(first, framework="pt") as file:
        weights["pos_embed"] = file.get_tensor("pos_embed")  # fixed, so it has no average
    model_config = MoHDiTTransformer2DModel.load_config(first.parent)
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel.from_config(model_config)
    with atomic_output(output, manifest=True) as partial:
        model.save_config(partial)
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    print(
        f"wrote {output}: width {config.std:g} at step {step}, computed from {len(snapshots)} "
        f"snapshots; relative error of the profile {error:.2%}"
    )
