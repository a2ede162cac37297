"""Compare averages computed after a run with exact averages in float64."""

import sys

import numpy as np
import pytest
import torch
from helpers.reference_arrays import relative_error
from safetensors import SafetensorError
from torch import nn

from moh_dit.__main__ import run_command
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common.errors import UserError
from moh_dit.training import posthoc_ema
from moh_dit.training.config import EvaluationConfig, ModelConfig, TrainConfig
from moh_dit.training.ema import PowerEma, power_gamma
from moh_dit.training.posthoc_ema import PosthocConfig, Profile, fit_coefficients, reconstruct
from moh_dit.training.trainer import Trainer

STDS = [0.05, 0.1]


@pytest.mark.parametrize("std", [0.01, 0.1, 0.25])
def test_gamma_gives_the_relative_width(std):
    gamma, tau = power_gamma(std), np.linspace(0, 1, 200_001)
    profile = tau**gamma / np.trapezoid(tau**gamma, tau)
    mean = np.trapezoid(tau * profile, tau)
    assert np.trapezoid((tau - mean) ** 2 * profile, tau) ** 0.5 == pytest.approx(std, rel=1e-4)


def test_an_impossible_width_is_refused():
    with pytest.raises(UserError, match=r"0\.3; .* between 0 and 0\.289"):
        power_gamma(0.3)


def exact_average(values, std):
    """Return Σ w_k x_k, where w_k ∝ k^(γ+1) - (k-1)^(γ+1) is the integral over step k."""
    steps = np.arange(len(values) + 1) / len(values)
    return np.diff(steps ** (power_gamma(std) + 1)) @ values


def walk(num_steps):
    """Return a random walk (num_steps, 16) whose steps become smaller, in float64."""
    random = np.random.default_rng(0)
    rate = np.cos(np.linspace(0, np.pi / 2, num_steps))[:, None]
    return np.cumsum(rate * random.normal(size=(num_steps, 16)), axis=0)


def test_the_tracked_average_is_the_power_function():
    values, model = walk(300), nn.Linear(16, 1, bias=False).double()
    average = PowerEma(model, 0.1)
    for step, value in enumerate(values, 1):
        model.weight.data.copy_(torch.from_numpy(value))
        average.set_step(step)
        average.update(model)
    found = average.model.weight.detach()[0]
    assert relative_error(found, torch.from_numpy(exact_average(values, 0.1))) < 1e-12


@pytest.mark.parametrize(("std", "bound"), [(0.05, 1e-3), (0.07, 1e-2), (0.12, 1e-2), (0.2, 2e-2)])
def test_any_width_is_reconstructed_from_two(std, bound):
    values = walk(4000)
    stored = [Profile(step, s) for step in range(250, 4001, 250) for s in STDS]
    coefficients, error = fit_coefficients(stored, Profile(4000, std))
    averages = np.stack([exact_average(values[: p.step], p.std) for p in stored])
    exact = exact_average(values, std)
    found = coefficients @ averages
    # Relative to the distance between the exact average and the last weights.
    assert np.linalg.norm(found - exact) / np.linalg.norm(values[-1] - exact) < bound
    assert error < 0.1


def test_snapshots_of_a_run_give_a_model_to_sample(tmp_path, monkeypatch, capsys):
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), num_steps=12, batch_size=8, checkpoint_every=6,
        keep_checkpoints=1, ema_power_stds=STDS, ema_snapshot_every=3,
        model=ModelConfig(hidden_size=32, depth=1, num_heads=4),
        evaluation=EvaluationConfig(num_inference_steps=1),
    )  # fmt: skip
    Trainer(config).train()
    snapshots = sorted(p.name for p in (tmp_path / "run" / "snapshots").iterdir())
    assert snapshots == [f"step-{s:08d}" for s in (3, 6, 9, 12)]
    argv = ["posthoc_ema", f"--run={tmp_path / 'run'}", "--std=0.1"]
    monkeypatch.setattr(sys, "argv", argv)
    run_command("ema")
    assert "from 8 snapshots; relative error of the profile 0.00%" in capsys.readouterr().out
    # For a stored width, the fit must select the one snapshot with this width.
    found, stored = (load_pipeline(tmp_path / "run", weights).transformer.state_dict()
                     for weights in ("ema-posthoc-0.1", "ema-power-0.1"))  # fmt: skip
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
    with pytest.raises(UserError, match="exists"):
        reconstruct(PosthocConfig(str(tmp_path / "run"), 0.1))
    with pytest.raises(UserError, match=r"last snapshot of .* is at step 12"):
        reconstruct(PosthocConfig(str(tmp_path / "run"), 0.1, step=13))
    with pytest.raises(UserError, match="no checkpoint at step 6"):
        reconstruct(PosthocConfig(str(tmp_path / "run"), 0.1, step=6))
    with monkeypatch.context() as patch:
        patch.setattr(posthoc_ema, "save_file", fail_with_full_disk)
        with pytest.raises(UserError, match=r"ema-posthoc-0\.07 could not be written .*space"):
            reconstruct(PosthocConfig(str(tmp_path / "run"), 0.07))
    assert not list((tmp_path / "run").rglob("*posthoc-0.07"))


def fail_with_full_disk(*arguments, **options):
    raise SafetensorError("No space left on device")
