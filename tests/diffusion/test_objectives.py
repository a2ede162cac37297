"""Objectives beyond the papers': predictions, loss weights, sampling with diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from moh_dit.common.errors import UserError
from moh_dit.diffusion.objectives import FlowObjective, NoiseObjective


def draw(objective, batch_size=6):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, batch_size, 4, 4, 4, generator=generator).double()
    return latents, noise, objective.draw_times(batch_size, generator)


def test_v_is_what_diffusers_calls_v():
    objective = NoiseObjective("v_prediction", learned_variance=False)
    latents, noise, times = draw(objective)
    velocity = DDPMScheduler.from_config(objective.scheduler.config).get_velocity(
        latents, noise, times
    )
    mse, vlb = objective.loss(velocity, latents, noise, times)
    assert mse.max() < 1e-10
    assert not vlb.any()
    assert objective.loss(velocity + 1, latents, noise, times).mse.min() > 0.99
    assert objective.output_channels(4) == 4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_bound_the_error_in_the_latents(prediction):
    """The weighted loss is min(SNR, γ) times the squared error of x̂_0."""
    objective = NoiseObjective(prediction, learned_variance=False, min_snr_gamma=5.0)
    times = torch.tensor([0, 50, 300, 999])
    alpha_bar = objective.scheduler.alphas_cumprod[times]
    snr = alpha_bar / (1 - alpha_bar)
    # ε - ε̂ = -√SNR (x - x̂) and v - v̂ = -(x - x̂)/√(1-ᾱ), 1/(1-ᾱ) = SNR + 1.
    error = snr if prediction == "epsilon" else 1 / (1 - alpha_bar)
    torch.testing.assert_close(
        objective.weights(times) * error, snr.clamp(max=5.0), rtol=2e-3, atol=0
    )
    assert (NoiseObjective(prediction, learned_variance=False).weights(times) == 1).all()


def test_flow_of_the_true_velocity_leads_to_the_data():
    objective = FlowObjective()
    latents, noise, times = draw(objective)
    assert objective.loss(noise - latents, latents, noise, times).mse.max() < 1e-12
    scheduler = objective.scheduler
    scheduler.set_timesteps(7)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(noise - latents, t, x).prev_sample
    torch.testing.assert_close(x, latents, atol=1e-5, rtol=0)
    middle = objective.add_noise(latents, noise, torch.full((6,), 250.0))
    torch.testing.assert_close(middle, 0.75 * latents + 0.25 * noise)


def test_flow_times_are_logit_normal():
    times = FlowObjective(0.5, 0.8).draw_times(20_000, torch.Generator().manual_seed(0)) / 1000
    logits = torch.logit(times.double())
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


def test_learned_variance_needs_epsilon():
    with pytest.raises(UserError, match="learned_variance goes with epsilon"):
        NoiseObjective("v_prediction", learned_variance=True)
