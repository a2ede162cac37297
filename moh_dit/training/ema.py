"""Averages of the weights over training, to sample with: exponential ones and power functions."""

import copy
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import UserError
from .sharding import is_sharded, joined_like, local, spread_like

Model = TypeVar("Model", bound=nn.Module)

MAX_POWER_STD = 12**-0.5  # of a flat average over the whole run


class WeightAverage(Generic[Model]):
    """One average of a model's trainable weights, held as a model of its own.

    Args:
        model: the model to follow; its current weights are the first average.
    """

    name: str  # of its folder in a checkpoint

    def __init__(self, model: Model):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        self._whole = [average for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = list(self._whole)
        self._spread_like: list[Tensor] = []

    def decay_at(self, step: int) -> float:
        """What remains of the average in step ``step`` (from 1)."""
        raise NotImplementedError

    @torch.no_grad()
    def spread(self, model: nn.Module) -> None:
        """From now on average part by part, if ``model`` is spread over processes (FSDP2).

        To be called again whenever ``self.model`` was given other weights.
        """
        self._spread_like = [w for w in _trainable(model) if is_sharded(w)]
        if self._spread_like:
            pairs = zip(self._whole, self._spread_like, strict=True)
            self._averages = [local(spread_like(average, w)).clone() for average, w in pairs]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after optimizer step ``step`` (from 1)."""
        weights = [local(weight) for weight in _trainable(model)]
        torch._foreach_lerp_(self._averages, weights, 1 - self.decay_at(step))

    @torch.no_grad()
    def gather(self) -> None:
        """Bring ``self.model`` up to date, if the average is spread; all processes have to."""
        if self._spread_like:
            spread = zip(self._whole, self._averages, self._spread_like, strict=True)
            for average, part, weight in spread:
                average.copy_(joined_like(part, weight))


class Ema(WeightAverage[Model]):
    """Exponential average, warmed up so that short runs sample well.

    After step t (counted from 1) the average moves by ``1 - min(decay, t / (t + 9))`` towards the
    weights: over the first steps it forgets the initial noise as fast as an average over the last
    tenth of the run so far would; a constant decay of 0.9999 would still be 61 % noise after
    5,000 steps.

    Args:
        model: the model to follow; its current weights are the first average.
        decay: the decay reached in the long run, in [0, 1).
    """

    def __init__(self, model: Model, decay: float):
        super().__init__(model)
        self.decay = decay
        self.name = ema_name(decay)

    def decay_at(self, step: int) -> float:
        return min(self.decay, step / (step + 9))


class PowerEma(WeightAverage[Model]):
    """Average whose weight on step τ of t grows like τ^γ (EDM2, arXiv 2312.02696, §3.1).

    From two of them with different widths, stored now and then, an average of any width can be
    reconstructed after the run (``posthoc_ema``).

    Args:
        model: the model to follow.
        std: relative standard deviation σ_rel of the profile, a share of the run so far.
    """

    def __init__(self, model: Model, std: float):
        super().__init__(model)
        self.std = std
        self.gamma = power_gamma(std)
        self.name = power_name(std)

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


def ema_name(decay: float) -> str:
    """What an average of this decay is called in a checkpoint."""
    return f"ema-{decay}"


def power_name(std: float) -> str:
    """What an average of this width is called in a checkpoint and among the snapshots."""
    return f"ema-power-{std:g}"


def power_gamma(std: float) -> float:
    """γ of the profile whose relative standard deviation is ``std``.

    σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), solved for γ (EDM2, §3.1).

    Raises:
        UserError: ``std`` is not between 0 and 0.289, the width of a flat average.
    """
    if not 0 < std < MAX_POWER_STD:
        raise UserError(
            f"{std:g} is no relative width of a power-function average; it must lie between 0 and "
            f"{MAX_POWER_STD:.3f}, the width of an average over the whole run"
        )
    # (γ + 2)² (γ + 3) - (γ + 1) / σ² = 0
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
