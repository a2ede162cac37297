"""Compare the loss with results of the published code and with closed forms."""

import math

import pytest
import torch
from helpers.models import reference_model
from helpers.reference_arrays import relative_error

from moh_dit.diffusion.process import (
    DiffusionProcess,
    LearnedVarianceDDPMScheduler,
    discretised_gaussian_nll,
    gaussian_kl,
    make_scheduler,
)


@pytest.mark.parametrize("case", ["uniform_heads", "pyramid_heads"])
def test_loss_per_image_matches_published(case):
    model, _, arrays = reference_model(case)
    latents, noise, t, y = (arrays[f"train.{name}"] for name in ("x0", "noise", "t", "y"))
    process = DiffusionProcess(make_scheduler())
    with torch.no_grad():
        output = model(process.add_noise(latents, noise, t), t, y).sample
        mse, vlb = process.loss(output, latents, noise, t)
    assert relative_error(mse, arrays["train.mse"]) < 1e-8
    assert relative_error(vlb, arrays["train.vb"]) < 1e-8
    assert relative_error(mse + vlb, arrays["train.loss"]) < 1e-8


def test_bound_trains_the_variance_alone():
    process = DiffusionProcess(make_scheduler())
    output = torch.randn(3, 8, 4, 4, requires_grad=True)
    x, noise = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    _, vlb = process.loss(output, x, noise, torch.tensor([0, 10, 999]))
    (gradient,) = torch.autograd.grad(vlb.sum(), output)
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].flatten(1).any(1).all()


def test_bound_is_zero_for_the_true_posterior():
    process = DiffusionProcess(make_scheduler())
    x, noise = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 4, 4, 4).double()
    output = torch.cat([noise, torch.full_like(noise, -1)], dim=1)  # ε exact, σ² = β̃_t
    mse, vlb = process.loss(output, x, noise, torch.tensor([1, 700]))
    assert not mse.any()
    torch.testing.assert_close(vlb, torch.zeros(2).double(), atol=1e-9, rtol=0)


def test_steps_agree_with_diffusers_to_the_digits_it_keeps():
    torch.manual_seed(0)
    theirs = make_scheduler()
    ours = LearnedVarianceDDPMScheduler.from_config(theirs.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x, output = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    for t in ours.timesteps:
        generators = [torch.Generator().manual_seed(int(t)) for _ in range(2)]
        a, b = (s.step(output, t, x, g) for s, g in zip((ours, theirs), generators, strict=True))
        assert relative_error(a.prev_sample, b.prev_sample) < 2e-4
        assert relative_error(a.pred_original_sample, b.pred_original_sample) < 2e-4


def test_tables_keep_the_digits_of_small_betas():
    scheduler = make_scheduler()
    log_beta = DiffusionProcess(scheduler).tables["log_beta"]
    betas = torch.linspace(1e-4, 2e-2, 1000).double()
    torch.testing.assert_close(log_beta.double(), betas.log(), rtol=2e-7, atol=0)
    ratio = 1 - scheduler.alphas_cumprod[1] / scheduler.alphas_cumprod[0]
    assert abs(ratio.item() / betas[1].item() - 1) > 1e-6  # the precision of diffusers' float32


def test_kl_and_nll_against_torch_distributions():
    torch.manual_seed(0)
    mean1, mean2, log1, log2 = torch.randn(4, 50).double()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean1, (log1 / 2).exp()),
        torch.distributions.Normal(mean2, (log2 / 2).exp()),
    )
    torch.testing.assert_close(gaussian_kl(mean1, log1, mean2, log2), expected)

    x = torch.linspace(-0.99, 0.99, 50).double()
    normal = torch.distributions.Normal(mean1, (log1 / 2).exp())
    mass = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
    near = mass > 1e-3  # the tanh approximation is good to 3e-4 in the distribution function
    nll = discretised_gaussian_nll(x, mean1, log1)
    torch.testing.assert_close(nll[near], -mass[near].log(), atol=0.1, rtol=0)
    edge = discretised_gaussian_nll(torch.ones(1), torch.zeros(1), torch.zeros(1))
    assert edge.item() == pytest.approx(-math.log(0.1596), abs=1e-3)  # 1 - Φ(1 - 1/255)
