"""Average the weights over training: exponential moving averages and power-function averages."""

import copy
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..common.compat import move_towards_
from ..common.errors import UserError
from .sharding import CopyTensor, gather_like, is_sharded, local_shard, shard_like

Model = TypeVar("Model", bound=nn.Module)

MAX_POWER_STD = 12**-0.5  # relative width of a uniform average over the whole run


class WeightAverage(Generic[Model]):
    """A running average of a model's trainable weights, stored as a second model.

    ``model`` of this object holds the full average. Under FSDP2 each rank updates only its shard,
    and :meth:`gather` copies the shards into ``model``.

    Args:
        model: the model to follow; the average starts at its current weights.
    """

    name: str  # of the folder in a checkpoint

    def __init__(self, model: Model):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        self._full = [average for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = list(self._full)
        self._sharded_weights: list[Tensor] = []
        device = self._full[0].device
        # On the device, so that a CUDA graph can replay the update with another factor.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._factor = torch.zeros((), dtype=dtype, device=device)

    def decay_at(self, step: int) -> float:
        """Return the factor of the old average in the update after step ``step`` (from 1)."""
        raise NotImplementedError

    @torch.no_grad()
    def shard(self, model: nn.Module) -> None:
        """Keep only this rank's shards of the average if ``model`` is sharded (FSDP2).

        Call this again after ``self.model`` was loaded with other weights.
        """
        self._sharded_weights = [weight for weight in _trainable(model) if is_sharded(weight)]
        if self._sharded_weights:
            pairs = zip(self._full, self._sharded_weights, strict=True)
            self._averages = [local_shard(shard_like(full, like)).clone() for full, like in pairs]

    def set_step(self, step: int) -> None:
        """Set the factor of the update after optimizer step ``step`` (from 1)."""
        self._factor.fill_(1 - self.decay_at(step))

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor | None = None) -> None:
        """Move the average towards ``model`` by the factor of the step.

        Args:
            model: the model in training.
            skip: float32 scalar on the device; 1 leaves the average unchanged.
        """
        weights = [local_shard(weight.detach()) for weight in _trainable(model)]
        move_towards_(self._averages, weights, self._factor, skip)

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the shards of all ranks into ``self.model``; all ranks must call this."""
        if self._sharded_weights:
            shards = zip(self._full, self._averages, self._sharded_weights, strict=True)
            for full, shard, weight in shards:
                full.copy_(gather_like(shard, weight))

    def gather_state(self, copy: CopyTensor | None) -> dict[str, Tensor]:
        """Return copies of the full average, see :func:`moh_dit.training.sharding.gather_state`."""
        self.gather()
        if copy is None:
            return {}
        state = self.model.state_dict()
        return {name: copy(f"{self.name}.{name}", tensor) for name, tensor in state.items()}


class Ema(WeightAverage[Model]):
    """Exponential moving average (EMA) with a warm-up, so that short runs sample well.

    After step t (counted from 1) the average moves by ``1 - min(decay, t / (t + 9))`` towards the
    weights. During the warm-up this averages over roughly the last tenth of the run. Without it, an
    average with decay 0.9999 would still consist of 61 % initial weights after 5,000 steps.

    Args:
        model: the model to follow; the average starts at its current weights.
        decay: the decay after the warm-up, in [0, 1).
    """

    def __init__(self, model: Model, decay: float):
        super().__init__(model)
        self.decay = decay
        self.name = ema_name(decay)

    def decay_at(self, step: int) -> float:
        return min(self.decay, step / (step + 9))


class PowerEma(WeightAverage[Model]):
    """Average in which step τ has a weight proportional to τ^γ (EDM2, arXiv 2312.02696, §3.1).

    ``posthoc_ema`` computes an average of any width from snapshots of two such averages.

    Args:
        model: the model to follow.
        std: standard deviation σ_rel of the weight over the steps, relative to the number of steps.
    """

    def __init__(self, model: Model, std: float):
        super().__init__(model)
        self.std = std
        self.gamma = power_gamma(std)
        self.name = power_name(std)

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


def ema_name(decay: float) -> str:
    """Return the folder name of an EMA in a checkpoint."""
    return f"ema-{decay}"


def power_name(std: float) -> str:
    """Return the folder name of a power-function average in checkpoints and snapshots."""
    return f"ema-power-{std:g}"


def power_gamma(std: float) -> float:
    """Return γ of the power-function average with relative standard deviation ``std``.

    It solves σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) for γ (EDM2, §3.1).

    Raises:
        UserError: ``std`` is not between 0 and 0.289, the width of a uniform average.
    """
    if not 0 < std < MAX_POWER_STD:
        raise UserError(
            f"the width of a power-function average is {std:g}; it must lie between 0 and "
            f"{MAX_POWER_STD:.3f}, the width of a uniform average over the whole run"
        )
    # (γ + 2)² (γ + 3) - (γ + 1) / σ² = 0
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
