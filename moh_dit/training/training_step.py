"""Compute one optimizer step: forward, backward, clipping, AdamW and the weight averages.

Nothing here waits for the device or depends on the number of the step. What changes from step to
step lies in tensors: the learning rate, the factors of the averages, the images and the random
numbers. A CUDA graph can therefore replay the whole step (see ``graphed_step``).
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..autoencoder import LatentScaling, sample_posterior
from ..diffusion.objectives import Objective
from ..model.transformer import MoHDiTOutput, MoHDiTTransformer2DModel
from .balance import BalanceLoss
from .config import TrainConfig
from .ema import WeightAverage
from .nonfinite import NonFiniteGuard
from .step_inputs import MicroBatch, StepRandomNumbers

LOSS_TERMS = ("mse", "vlb", "balance")


class StepOutput(NamedTuple):
    """Results of one step, on the device."""

    terms: Tensor  # (3,), the loss terms, averaged over the global batch
    grad_norm: Tensor  # scalar, the global gradient norm before clipping
    parameter_norms: Tensor  # the gradient norm of each trainable parameter
    nonfinite: Tensor  # bool scalar, whether loss or gradient must be reported
    load: Tensor | None  # (ΣE,), the load f of all routed heads; None for a dense model


class TrainingStep:
    """Computes optimizer steps of a model.

    Args:
        config: settings of the run.
        accelerator: the processes, the precision and the loss scaler.
        model: the model as the accelerator prepared it.
        raw_model: the same model without a wrapper.
        objective: adds the noise and computes the loss.
        scaling: scaling of the autoencoder's latents.
        optimizer: AdamW as the accelerator prepared it.
        averages: averages of the weights.
        guard: clips the gradient and skips updates that are not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: nn.Module,
        raw_model: MoHDiTTransformer2DModel,
        objective: Objective,
        scaling: LatentScaling,
        optimizer: Any,
        averages: list[WeightAverage[MoHDiTTransformer2DModel]],
        guard: NonFiniteGuard,
    ):
        self.config, self.accelerator = config, accelerator
        self.model, self.raw_model = model, raw_model
        self.objective, self.scaling = objective, scaling
        self.optimizer, self.averages, self.guard = optimizer, averages, guard
        active = [layer.num_active_routed_heads for layer in raw_model.routed_layers.values()]
        self.balance = BalanceLoss(accelerator, active, config.balance_loss == "published")
        self.learning_rate = 0.0
        self._rate: Tensor | None = None
        # AdamW cannot combine FSDP2's shards with a learning rate in a plain tensor.
        if accelerator.device.type == "cuda" and not accelerator.is_fsdp2:
            self._rate = torch.zeros((), device=accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = self._rate

    def set_step(self, step: int, learning_rate: float) -> None:
        """Set the learning rate and the factors of the averages for step ``step`` (from 1)."""
        self.learning_rate = learning_rate
        if self._rate is not None:
            self._rate.fill_(learning_rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        for average in self.averages:
            average.set_step(step)

    def __call__(self, micro_batches: list[MicroBatch]) -> StepOutput:
        """Update the weights and their averages by this process's micro-batches of a step."""
        accelerator = self.accelerator
        self.balance.start_step(self._observe(micro_batches))
        terms = torch.zeros(len(LOSS_TERMS), device=accelerator.device)
        for number, micro_batch in enumerate(micro_batches):
            # Exchange gradients between processes only after the last micro-batch.
            last = number == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss, micro_batch_terms = self.loss(*micro_batch)
                accelerator.backward(loss / len(micro_batches))
            terms += micro_batch_terms.detach() / len(micro_batches)
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self.optimizer)
        terms = cast(Tensor, accelerator.reduce(terms, "mean"))
        norms = self.guard.before_update(terms)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.raw_model, skip=norms.skip)
        return StepOutput(terms, norms.total, norms.each, norms.nonfinite, self.balance.load())

    @torch.no_grad()
    def _observe(self, micro_batches: list[MicroBatch]) -> list:
        """Compute the router statistics of all micro-batches in a separate forward pass."""
        if self.config.balance_loss != "two_pass" or len(micro_batches) == 1:
            return []
        outputs = [self.predict(*micro_batch)[0] for micro_batch in micro_batches]
        return [output.router_stats for output in outputs if output.router_stats is not None]

    def predict(
        self, moments: Tensor, labels: Tensor, random: StepRandomNumbers
    ) -> tuple[MoHDiTOutput, Tensor]:
        """Return the model output for one micro-batch, and its latents (b, C, h, w)."""
        latents = sample_posterior(moments, random.posterior_noise, self.scaling)
        labels = torch.where(random.drop_label, self.raw_model.null_class, labels)
        noisy = self.objective.add_noise(latents, random.noise, random.times)
        with self.accelerator.autocast():
            return self.model(noisy, random.times, labels), latents

    def loss(
        self, moments: Tensor, labels: Tensor, random: StepRandomNumbers
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of one micro-batch, and its terms (MSE, VLB, load balance)."""
        output, latents = self.predict(moments, labels, random)
        mse, vlb = self.objective.loss(output.sample, latents, random.noise, random.times)
        balance = latents.new_zeros(())
        if output.router_stats is not None:
            balance = self.balance(output.router_stats)
        loss = mse.mean() + vlb.mean() + self.config.balance_loss_weight * balance
        return loss, torch.stack([mse.mean(), vlb.mean(), balance])
