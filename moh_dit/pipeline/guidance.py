"""Predict noise, combined by classifier-free guidance or autoguidance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import UserError
from ..model.transformer import MoHDiTTransformer2DModel
from .forward_graphs import ForwardGraphs


@dataclass
class Guidance:
    """Guidance of the predicted noise: ε̂ = ε_weak + scale · (ε_cond - ε_weak).

    ε_weak is the prediction for the null class (classifier-free guidance, arXiv 2207.12598) or that
    of a weaker model for the same class (autoguidance, arXiv 2406.02070).

    Attributes:
        scale: the weight w; 1 turns guidance off.
        num_channels: guide only this number of latent channels, from the first; ``None`` for all.
            The papers guide 3 of 4 channels by mistake, so 3 reproduces their samples.
        interval: guide only at timesteps in this interval, as fractions of the process where 1 is
            pure noise (limited interval, arXiv 2404.07724).
        model: the weaker model of autoguidance; ``None`` for the null class.
    """

    scale: float = 4.0
    num_channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    model: MoHDiTTransformer2DModel | None = None

    def check(self, transformer: MoHDiTTransformer2DModel) -> None:
        """Raise ``UserError`` for values that this model does not support."""
        channels = transformer.config.in_channels
        if self.num_channels is not None and not 1 <= self.num_channels <= channels:
            raise UserError(
                f"guidance_channels is {self.num_channels}, but must be between 1 and "
                f"{channels}, the number of latent channels"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"guidance_interval is {low}, {high}; give two fractions of the process, "
                "0 ≤ low ≤ high ≤ 1 (1 is pure noise)"
            )
        if self.model is not None:
            for key in ("in_channels", "out_channels", "sample_size", "num_classes"):
                weak, main = self.model.config[key], transformer.config[key]
                if weak != main:
                    raise UserError(
                        f"guidance_model has {key} {weak}, but the model has {main}; both must be "
                        "equal"
                    )

    @property
    def is_limited(self) -> bool:
        """Whether some steps may be guided and others not."""
        return self.scale != 1.0 and self.interval != (0.0, 1.0)

    def active_at(self, timestep: Tensor, num_train_timesteps: int) -> bool:
        """Return whether a step at this timestep is guided."""
        low, high = self.interval
        return self.scale != 1.0 and low <= float(timestep) / num_train_timesteps <= high

    def __call__(self, conditional: Tensor, weak: Tensor, latent_channels: int) -> Tensor:
        """Combine two predictions (B, C or 2C, H, W); the variance is that of ``conditional``."""
        guided = self.num_channels or latent_channels
        epsilon = weak[:, :guided] + self.scale * (conditional[:, :guided] - weak[:, :guided])
        return torch.cat([epsilon, conditional[:, guided:]], dim=1)


def predict(
    model: MoHDiTTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    labels: Tensor,
    guidance: Guidance | None,
    graphs: ForwardGraphs,
) -> Tensor:
    """Return the prediction (B, out_channels, h, w), guided unless ``guidance`` is ``None``.

    Args:
        model: the model to evaluate.
        latents: (B, in_channels, h, w).
        timestep: a scalar, the same for all images.
        labels: int64 (B,).
        guidance: how to guide this step.
        graphs: replays the forward passes.
    """
    if guidance is None:
        return _evaluate(model, latents, timestep, labels, graphs)
    if guidance.model is not None:
        conditional = _evaluate(model, latents, timestep, labels, graphs)
        weak = _evaluate(guidance.model, latents, timestep, labels, graphs)
    else:
        null = torch.full_like(labels, model.config.num_classes)
        both = torch.cat([latents] * 2), timestep, torch.cat([labels, null])
        conditional, weak = _evaluate(model, *both, graphs).chunk(2)
    return guidance(conditional, weak, model.config.in_channels)


def _evaluate(
    model: MoHDiTTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    labels: Tensor,
    graphs: ForwardGraphs,
) -> Tensor:
    """Return the output of a model at one timestep, in the dtype of the latents."""
    inputs = latents.to(model.dtype), timestep.expand(len(latents)), labels
    if model.is_cache_enabled:
        # Guided and unguided steps differ in batch size, so each size has its own cache.
        with model.cache_context(f"batch of {len(latents)}"):
            output = model(*inputs).sample
    else:
        output = graphs(model, *inputs)
    # Copied, because CUDA graphs of torch.compile overwrite it in the next call.
    return output.to(latents.dtype, copy=True)
