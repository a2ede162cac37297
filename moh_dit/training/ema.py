"""Exponential moving averages of the weights, warmed up so that short runs sample well."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """One average of a model's trainable weights, held as a model of its own.

    After step t (counted from 1) the average moves by ``1 - min(decay, t / (t + 9))`` towards the
    weights: over the first steps it forgets the initial noise as fast as an average over the last
    tenth of the run so far would; a constant decay of 0.9999 would still be 61 % noise after
    5,000 steps.

    Args:
        model: the model to follow; its current weights are the first average.
        decay: the decay reached in the long run, in [0, 1).
    """

    def __init__(self, model: Model, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after optimizer step ``step`` (from 1)."""
        decay = min(self.decay, step / (step + 9))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
