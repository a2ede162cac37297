"""The diffusion objective: MSE on the noise plus the bound that trains the learned variance.

DDPM (arXiv 2006.11239) with the learned variance of Improved DDPM (arXiv 2102.09672), over the
constants of a diffusers ``DDPMScheduler``, which also samples from the model.
"""

import math
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor


def make_scheduler(num_train_timesteps: int = 1000, learned_variance: bool = True) -> DDPMScheduler:
    """The papers' process: linear β from 1e-4 to 2e-2, ancestral sampling, no clipping.

    Args:
        num_train_timesteps: length T of the process the model is trained on.
        learned_variance: whether the model predicts the variance values v beside the noise.
    """
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        variance_type="learned_range" if learned_variance else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def float64_constants(scheduler: DDPMScheduler) -> DDPMScheduler:
    """Recompute the scheduler's β and ᾱ in float64, in place, and return it.

    diffusers rounds them to float32, where 1 - ᾱ_t / ᾱ_{t-1} keeps three digits of a β of 1e-4.
    Latents keep their own dtype: a 0-dimensional constant does not promote them.
    """
    config = scheduler.config
    if config.beta_schedule != "linear" or config.trained_betas is not None:
        return scheduler  # nothing is known that would be more exact than what diffusers holds
    steps = config.num_train_timesteps
    scheduler.betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


class DiffusionLoss(NamedTuple):
    """Per-image terms (B,): ``mse`` of the noise and ``vlb`` in bits per dimension."""

    mse: Tensor
    vlb: Tensor


class DiffusionProcess:
    """q(x_t | x_0) and the training loss of a model that predicts ε and the variance values v.

    Args:
        scheduler: source of the β schedule (its ``config`` alone is used).
        device: where the tables live; float32, T values each.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device | str = "cpu"):
        alpha_bar = float64_constants(type(scheduler).from_config(scheduler.config)).alphas_cumprod
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])  # ᾱ_{t-1}
        alpha = alpha_bar / previous
        beta = 1 - alpha
        posterior = beta * (1 - previous) / (1 - alpha_bar)  # β̃_t, DDPM eq. 7
        posterior[0] = posterior[1]  # β̃_0 is 0 and its log is needed
        tables = dict(
            sqrt_alpha_bar=alpha_bar.sqrt(),
            sqrt_noise=(1 - alpha_bar).sqrt(),
            recip_alpha_bar=(1 / alpha_bar).sqrt(),
            recip_noise=(1 / alpha_bar - 1).sqrt(),
            mean_x0=beta * previous.sqrt() / (1 - alpha_bar),  # DDPM eq. 7
            mean_xt=(1 - previous) * alpha.sqrt() / (1 - alpha_bar),
            log_beta=beta.log(),
            log_posterior=posterior.log(),
        )
        self.num_timesteps = len(alpha_bar)
        # Rounded where the published code rounds, so that the loss is the same to the last digits.
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def constant(self, name: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """Row of a table at each image's timestep, shaped to broadcast over ``like`` (B, …)."""
        return self.tables[name][timesteps].to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε (DDPM eq. 4)."""
        signal = self.constant("sqrt_alpha_bar", timesteps, latents)
        return signal * latents + self.constant("sqrt_noise", timesteps, latents) * noise

    def loss(
        self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> DiffusionLoss:
        """Per-image loss terms; the papers minimise ``(mse + vlb).mean()``.

        Args:
            model_output: (B, 2C, H, W), ε̂ then v, for ``add_noise(latents, noise, timesteps)``.
            latents: (B, C, H, W), x_0.
            noise: (B, C, H, W), the ε that was added.
            timesteps: int64 (B,), ``0 … T-1``.
        """
        predicted_noise, v = model_output.to(latents.dtype).chunk(2, dim=1)
        mse = image_mean((noise - predicted_noise).square())

        # The bound trains v alone: ε̂ is detached in it (iDDPM §3.1).
        noisy = self.add_noise(latents, noise, timesteps)
        mean, log_variance = self.reverse(predicted_noise.detach(), v, noisy, timesteps)
        true_mean = self.posterior_mean(latents, noisy, timesteps)
        true_log_variance = self.constant("log_posterior", timesteps, latents)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = discretised_gaussian_nll(latents, mean, log_variance)
        first = (timesteps == 0).view(-1, 1, 1, 1)
        return DiffusionLoss(mse, image_mean(torch.where(first, nll, kl)) / math.log(2))

    def reverse(
        self, predicted_noise: Tensor, v: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log σ² of p(x_{t-1} | x_t) (DDPM eq. 11, iDDPM eq. 15)."""
        predicted_latents = self.constant("recip_alpha_bar", timesteps, noisy) * noisy
        predicted_latents -= self.constant("recip_noise", timesteps, noisy) * predicted_noise
        share = (v + 1) / 2
        log_variance = share * self.constant("log_beta", timesteps, noisy)
        log_variance = log_variance + (1 - share) * self.constant("log_posterior", timesteps, noisy)
        return self.posterior_mean(predicted_latents, noisy, timesteps), log_variance

    def posterior_mean(self, latents: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        weighted = self.constant("mean_x0", timesteps, noisy) * latents
        return weighted + self.constant("mean_xt", timesteps, noisy) * noisy


def image_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_var1) ‖ N(mean2, e^log_var2)) in nats, elementwise."""
    difference = log_var1 - log_var2
    squared = (mean1 - mean2).square() * (-log_var2).exp()
    return 0.5 * (difference.exp() + squared - 1 - difference)


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass in the bin of width 2/255 around x, in nats, elementwise.

    DDPM eq. 13, with the tanh approximation of the normal distribution function that Improved
    DDPM uses; the outermost bins reach to infinity.
    """
    inverse_std = (-0.5 * log_variance).exp()
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
