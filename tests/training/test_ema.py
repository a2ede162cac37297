"""Exponential moving averages: warm-up and decay."""

import math

import pytest
import torch
from torch import nn

from moh_dit.training.ema import Ema


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


def test_short_runs_forget_the_initial_weights():
    model = Weight()
    ema = Ema(model, 0.9999)
    with torch.no_grad():
        model.w.zero_()
    for step in range(1, 501):
        ema.set_step(step)
        ema.update(model)
    # Π t / (t + 9) over 500 steps = 9! · 500! / 509!: nothing is left of the initial weights.
    left = math.factorial(9) / math.prod(range(501, 510))
    assert ema.model.w.max().item() == pytest.approx(left)


def test_long_runs_average_with_the_given_decay():
    model, decay = Weight(), 0.9
    ema = Ema(model, decay)
    expected = model.w.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.w += 1
        ema.set_step(step)
        ema.update(model)
        d = min(decay, step / (step + 9))
        expected = d * expected + (1 - d) * model.w.detach()
    torch.testing.assert_close(ema.model.w.data, expected)
    lag = (model.w - ema.model.w).mean().item()
    assert lag == pytest.approx(decay / (1 - decay), rel=1e-3)  # of a ramp, in steps
    assert not any(p.requires_grad for p in ema.model.parameters())
