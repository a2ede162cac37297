"""Averages of any length after the run, from snapshots of two (EDM2, arXiv 2312.02696, §3.2).

    python -m moh_dit.training.posthoc_ema --run runs/mine --std 0.08
    python sample_dit.py --checkpoint runs/mine --weights ema-posthoc-0.08 ...

Every snapshot is a known average over the run: of the weights with profile p(τ) ∝ τ^γ up to its
step. The linear combination whose profile is nearest the wanted one in the least-squares sense is
the best guess at the wanted average, and a very good one.
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

from ..checkpoints.opening import WEIGHTS, checkpoint_name, checkpoint_step
from ..common.atomic_write import atomic_output
from ..common.errors import UserError
from ..common.progress import progress_bar
from ..model.transformer import MoHDiTTransformer2DModel
from .config import PosthocConfig
from .ema import power_gamma


@dataclass(frozen=True)
class Profile:
    """A power-function average: its weight on step τ ≤ ``step`` is proportional to τ^γ."""

    step: int
    std: float

    @property
    def gamma(self) -> float:
        return power_gamma(self.std)


def inner_product(a: Profile, b: Profile) -> float:
    """∫ p_a(τ) p_b(τ) dτ of two profiles with integral 1 (EDM2, appendix C)."""
    if a.step > b.step:
        a, b = b, a
    # p(τ) = (γ + 1) τ^γ / t^(γ + 1) up to t; the product ends where the shorter one does.
    ratio = (a.step / b.step) ** b.gamma
    return (a.gamma + 1) * (b.gamma + 1) * ratio / ((a.gamma + b.gamma + 1) * b.step)


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Coefficients of the stored averages, and how far off their combination is.

    Returns:
        float64 coefficients, one for each stored average, and ‖p - p_wanted‖ / ‖p_wanted‖ of the
        combined profile.
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    scale = np.diag(gram) ** -0.5  # profiles of unit length: late and early snapshots weigh alike
    solution = np.linalg.lstsq(gram * np.outer(scale, scale), target * scale, rcond=1e-14)[0]
    coefficients = solution * scale
    norm = inner_product(wanted, wanted)
    square = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(square, 0.0) / norm))


def list_snapshots(run: Path) -> dict[Profile, Path]:
    """The stored averages of a run and their files.

    Raises:
        UserError: the run has none.
    """
    found = {}
    for file in sorted((run / "snapshots").glob(f"step-*/ema-power-*/{WEIGHTS}")):
        std = float(re.sub("^ema-power-", "", file.parent.name))
        found[Profile(checkpoint_step(file.parent.parent), std)] = file
    if not found:
        raise UserError(
            f"run {run} has no snapshots of averages: train with --ema_power_stds '[0.05, 0.1]'"
        )
    return found


def combine(files: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ c_i w_i over the weights in safetensors files, summed in float64; float32 result."""
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
    """Write the average that the configuration asks for; see the fields for where."""
    run = Path(config.run)
    snapshots = list_snapshots(run)
    steps = sorted({profile.step for profile in snapshots})
    have = [s for s in steps if (run / "checkpoints" / checkpoint_name(s)).is_dir()]
    if config.step is None and not (have or config.output):
        raise UserError(f"no checkpoint of {run} has a snapshot of its step; give --output")
    step = config.step or (have[-1] if have and not config.output else steps[-1])
    if not 1 <= step <= steps[-1]:
        raise UserError(f"step is {step}; the snapshots of {run} end at step {steps[-1]}")
    if config.output is None and step not in have:
        raise UserError(f"{run} has no checkpoint of step {step}; give --output")
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    output = Path(config.output) if config.output else checkpoint / f"ema-posthoc-{config.std:g}"
    if output.exists():
        raise UserError(f"{output} exists; remove it, or choose another --output")

    # Averages that end later know nothing more of the steps before, but weigh them too.
    coefficients, error = combination(list(snapshots), Profile(step, config.std))
    weights = combine(list(snapshots.values()), coefficients.tolist())
    frozen = next(iter(snapshots.values()))
    with safe_open(frozen, framework="pt") as file:
        weights["pos_embed"] = file.get_tensor("pos_embed")  # never trained, so never averaged
    model_config = MoHDiTTransformer2DModel.load_config(frozen.parent)
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel.from_config(model_config)
    with atomic_output(output) as aside:
        model.save_config(aside)
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
    print(
        f"{output}: σ_rel {config.std:g} at step {step} from {len(snapshots)} snapshots; the "
        f"profile is met to {error:.2%}"
    )
