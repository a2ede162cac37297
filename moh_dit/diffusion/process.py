"""Compute the diffusion loss: MSE of the noise, and the variational bound for the variance.

DDPM (arXiv 2006.11239) with the learned variance of Improved DDPM (arXiv 2102.09672). The noise
schedule comes from a diffusers ``DDPMScheduler``, which also samples from the model.
"""

import math
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from .noise import ImageNoise


class DiffusionLoss(NamedTuple):
    """Loss terms per image (B,): ``mse`` of the noise, and ``vlb`` in bits per dimension."""

    mse: Tensor
    vlb: Tensor


class DiffusionProcess:
    """q(x_t | x_0), its reverse, and the training loss of a model that predicts ε and v.

    Args:
        scheduler: scheduler that defines β.
        timesteps: descending subset of ``0 … T-1`` to use instead of all timesteps (iDDPM §4). The
            timestep arguments of the methods are then positions ``0 … len - 1`` in this subset,
            counted from its end.
        device: device of the tables (float32, one value per timestep).
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        timesteps: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        alpha_bar = (1 - _float64_betas(scheduler)).cumprod(0)
        if timesteps is not None:
            alpha_bar = alpha_bar[timesteps.cpu().flip(0)]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])  # ᾱ_{t-1}
        alpha = alpha_bar / previous
        beta = 1 - alpha
        posterior = beta * (1 - previous) / (1 - alpha_bar)  # β̃_t, DDPM eq. 7
        # β̃_0 is 0, but its logarithm is needed: β̃_1 replaces it. With one step it is never used.
        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
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
        # Tables are computed in float64 and rounded once, as in the published code. Loss and
        # samples then agree with it up to rounding.
        self.tables = {name: table.float().to(device) for name, table in tables.items()}

    def constant(self, name: str, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """Look up a table at one timestep or one per image, shaped to broadcast over ``like``."""
        return self.tables[name][timesteps].to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def to(self, device: torch.device) -> None:
        """Move the tables to a device, unless they are there already."""
        if self.tables["log_beta"].device != device:
            self.tables = {name: table.to(device) for name, table in self.tables.items()}

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε (DDPM eq. 4)."""
        signal = self.constant("sqrt_alpha_bar", timesteps, latents)
        return signal * latents + self.constant("sqrt_noise", timesteps, latents) * noise

    def loss(
        self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> DiffusionLoss:
        """Return the loss terms per image; the papers minimize ``(mse + vlb).mean()``.

        Args:
            model_output: (B, 2C, H, W), ε̂ then v, for ``add_noise(latents, noise, timesteps)``.
            latents: (B, C, H, W), x_0.
            noise: (B, C, H, W), the ε that was added.
            timesteps: int64 (B,), ``0 … T-1``.
        """
        predicted_noise, v = model_output.to(latents.dtype).chunk(2, dim=1)
        mse = image_mean((noise - predicted_noise).square())

        # The bound trains only v, so ε̂ is detached (iDDPM §3.1).
        noisy = self.add_noise(latents, noise, timesteps)
        predicted = self.predict_latents(predicted_noise.detach(), noisy, timesteps)
        mean = self.posterior_mean(predicted, noisy, timesteps)
        log_variance = self.log_variance(v, timesteps)
        true_mean = self.posterior_mean(latents, noisy, timesteps)
        true_log_variance = self.constant("log_posterior", timesteps, latents)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = discretised_gaussian_nll(latents, mean, log_variance)
        first = (timesteps == 0).view(-1, 1, 1, 1)
        return DiffusionLoss(mse, image_mean(torch.where(first, nll, kl)) / math.log(2))

    def predict_latents(
        self, predicted_noise: Tensor, noisy: Tensor, timesteps: Tensor | int
    ) -> Tensor:
        """Return x̂_0 computed from x_t and ε̂ (DDPM eq. 4, solved for x_0)."""
        signal = self.constant("recip_alpha_bar", timesteps, noisy) * noisy
        return signal - self.constant("recip_noise", timesteps, noisy) * predicted_noise

    def log_variance(self, v: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return log σ², interpolated from log β̃_t (v = -1) to log β_t (v = 1) (iDDPM eq. 15)."""
        share = (v + 1) / 2
        upper = share * self.constant("log_beta", timesteps, v)
        return upper + (1 - share) * self.constant("log_posterior", timesteps, v)

    def posterior_mean(self, latents: Tensor, noisy: Tensor, timesteps: Tensor | int) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        weighted = self.constant("mean_x0", timesteps, noisy) * latents
        return weighted + self.constant("mean_xt", timesteps, noisy) * noisy


class LearnedVarianceDDPMScheduler(DDPMScheduler):
    """``DDPMScheduler`` of diffusers for a learned variance, computed by :class:`DiffusionProcess`.

    diffusers stores β in float32, where 1 - ᾱ_t / ᾱ_{t-1} keeps only three digits of a β of 1e-4.
    This class uses the precise tables instead. Saved pipelines name the parent class; sampling
    replaces it by this one, see :func:`moh_dit.diffusion.samplers.prepare_scheduler`.
    """

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        """Set the timesteps as the parent class does, and compute their tables."""
        super().set_timesteps(*args, **options)
        self._process = DiffusionProcess(self, self.timesteps)
        last = len(self.timesteps) - 1
        self._positions = {t: last - i for i, t in enumerate(self.timesteps.tolist())}

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | ImageNoise | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one ancestral step (DDPM eq. 11 with iDDPM eq. 15).

        Args:
            model_output: (B, 2C, H, W), ε̂ then v.
            timestep: one of ``timesteps``.
            sample: (B, C, H, W), x_t.
            generator: generator of the added noise, a list of one per image, or an
                :class:`ImageNoise`.
            return_dict: whether to return a ``DDPMSchedulerOutput`` or a tuple of its two tensors.
        """
        process, position = self._process, self._positions[int(timestep)]
        process.to(sample.device)
        predicted_noise, v = model_output.chunk(2, dim=1)
        predicted = process.predict_latents(predicted_noise, sample, position)
        previous = process.posterior_mean(predicted, sample, position)
        if position > 0:
            if isinstance(generator, ImageNoise):
                noise = generator.draw(sample.shape, sample.dtype)
            else:
                noise = scheduling_ddpm.randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            previous = previous + (0.5 * process.log_variance(v, position)).exp() * noise
        if not return_dict:
            return previous, predicted
        return scheduling_ddpm.DDPMSchedulerOutput(previous, predicted)


def make_scheduler(
    learned_variance: bool = True, prediction_type: str = "epsilon"
) -> DDPMScheduler:
    """Return the scheduler of the papers: 1000 steps, linear β, ancestral sampling, no clipping.

    Args:
        learned_variance: whether the model also predicts variance values v.
        prediction_type: prediction of the model, a value of ``DDPMScheduler.prediction_type``.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        variance_type="learned_range" if learned_variance else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def _float64_betas(scheduler: DDPMScheduler) -> Tensor:
    config = scheduler.config
    if config.beta_schedule == "linear" and config.trained_betas is None:
        steps = config.num_train_timesteps
        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    return scheduler.betas.double()


def image_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N(mean1, e^log_var1) ‖ N(mean2, e^log_var2)) in nats, elementwise."""
    difference = log_var1 - log_var2
    squared = (mean1 - mean2).square() * (-log_var2).exp()
    return 0.5 * (difference.exp() + squared - 1 - difference)


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of the Gaussian's mass in the bin of width 2/255 around x, in nats, elementwise.

    DDPM eq. 13, with the tanh approximation of the normal distribution function from Improved DDPM.
    The outermost bins extend to infinity.
    """
    inverse_std = (-0.5 * log_variance).exp()
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
