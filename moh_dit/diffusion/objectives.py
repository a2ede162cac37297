"""Define training objectives: the prediction, its loss, and the diffusers scheduler for sampling.

An objective draws times, adds noise to latents, and computes the loss of a model's output. The
papers use ``NoiseObjective`` with its defaults.
"""

from typing import Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from ..common.errors import UserError
from .process import DiffusionLoss, DiffusionProcess, image_mean, make_scheduler


class Objective(Protocol):
    """Interface of an objective, for times (B,) and latents (B, C, h, w)."""

    scheduler: SchedulerMixin

    def output_channels(self, in_channels: int) -> int:
        """Return the number of channels that the model must predict."""

    def draw_times(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw the model's ``timestep`` of each image (B,), on the generator's device."""

    def times_at(self, quantiles: Tensor) -> Tensor:
        """Return the times (B,) at these quantiles, in [0, 1), of the times that are drawn."""

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return latents with the noise of ``times``."""

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> DiffusionLoss:
        """Return loss terms (B,) of the model's output for ``add_noise(latents, noise, times)``."""


class NoiseObjective:
    """Predict ε, or v = √ᾱ ε - √(1-ᾱ) x_0 (arXiv 2202.00512, §4), in DDPM's process.

    Args:
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        learned_variance: whether the model also predicts variance values, trained by the
            variational bound. Only for ``"epsilon"``.
        min_snr_gamma: γ of min-SNR-γ weighting (arXiv 2303.09556, §3.4; the paper uses 5). The loss
            is weighted by min(SNR, γ) / SNR for ε and by min(SNR, γ) / (SNR + 1) for v. ``None``
            weights all timesteps equally.
        device: device of the tables.

    Raises:
        UserError: if the variance is learned with another prediction than ``"epsilon"``.
    """

    def __init__(
        self,
        prediction_type: str = "epsilon",
        learned_variance: bool = True,
        min_snr_gamma: float | None = None,
        device: torch.device | str = "cpu",
    ):
        if learned_variance and prediction_type != "epsilon":
            raise UserError(
                f"objective.learned_variance goes with epsilon, but objective.prediction_type is "
                f"{prediction_type}; set objective.learned_variance to false"
            )
        self.prediction_type = prediction_type
        self.learned_variance = learned_variance
        self.min_snr_gamma = min_snr_gamma
        self.scheduler = make_scheduler(learned_variance, prediction_type)
        self.process = DiffusionProcess(self.scheduler, device=device)

    def output_channels(self, in_channels: int) -> int:
        return 2 * in_channels if self.learned_variance else in_channels

    def draw_times(self, batch_size: int, generator: torch.Generator) -> Tensor:
        options = dict(generator=generator, device=generator.device)
        return torch.randint(self.process.num_timesteps, (batch_size,), **options)  # type: ignore[call-overload]

    def times_at(self, quantiles: Tensor) -> Tensor:
        return (quantiles * self.process.num_timesteps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.process.add_noise(latents, noise, times)

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> DiffusionLoss:
        if self.learned_variance:
            mse, vlb = self.process.loss(output, latents, noise, times)
        else:
            target = noise
            if self.prediction_type == "v_prediction":
                signal = self.process.constant("sqrt_alpha_bar", times, latents)
                target = signal * noise
                target = target - self.process.constant("sqrt_noise", times, latents) * latents
            mse = image_mean((output.to(target.dtype) - target).square())
            vlb = torch.zeros_like(mse)
        return DiffusionLoss(mse * self.weights(times), vlb)

    def weights(self, times: Tensor) -> Tensor:
        """Return the weight (B,) of each image's squared error."""
        ones = torch.ones_like(times, dtype=torch.float32)
        if self.min_snr_gamma is None:
            return ones
        signal = self.process.constant("sqrt_alpha_bar", times, ones).square()
        snr = signal / self.process.constant("sqrt_noise", times, ones).square()
        over = snr + 1 if self.prediction_type == "v_prediction" else snr
        return snr.clamp(max=self.min_snr_gamma) / over


class FlowObjective:
    """Rectified flow: x_σ = (1-σ) x_0 + σ ε, predict dx/dσ = ε - x_0 (arXiv 2209.03003).

    Args:
        logit_mean, logit_std: σ is the logistic function of N(mean, std²) (logit-normal times,
            arXiv 2403.03206, §3.1). The model receives 1000·σ as timestep.
    """

    def __init__(self, logit_mean: float = 0.0, logit_std: float = 1.0):
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def output_channels(self, in_channels: int) -> int:
        return in_channels

    def draw_times(self, batch_size: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(batch_size, generator=generator, device=generator.device)
        scale = self.scheduler.config.num_train_timesteps
        return scale * torch.sigmoid(self.logit_mean + self.logit_std * normal)

    def times_at(self, quantiles: Tensor) -> Tensor:
        normal = torch.special.ndtri(quantiles)
        scale = self.scheduler.config.num_train_timesteps
        return (scale * torch.sigmoid(self.logit_mean + self.logit_std * normal)).float()

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = (times / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> DiffusionLoss:
        mse = image_mean((output.to(latents.dtype) - (noise - latents)).square())
        return DiffusionLoss(mse, torch.zeros_like(mse))
