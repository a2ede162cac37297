"""Train an autoencoder on any images, with a reconstruction loss and a KL loss.

The loss is ``reconstruction + kl_weight · KL``. The reconstruction error is averaged over pixels,
the KL divergence over latent values (Kingma & Welling 2014, eq. 10, with the weight of β-VAE).
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from fid_eval.progress import progress_bar

from ..autoencoder import (
    LatentScaling,
    decode_latents,
    encode_moments,
    latent_scaling,
    latent_shape,
    load_autoencoder,
    sample_posterior,
)
from ..common.atomic_write import atomic_output
from ..common.cli import save_config
from ..common.errors import UserError
from ..data.images import ImageSet, load_batch, open_images, read_batches
from ..data.pixels import to_float, to_pixels
from .autoencoder_config import AutoencoderTrainingConfig


class _Autoencode(nn.Module):
    """Encode, sample and decode in one ``forward``, as data-parallel training requires."""

    def __init__(self, vae: AutoencoderKL, latent_noise: float = 0.0):
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, 3, H, W) in −1 … 1, using normal noise (B, C, h, w).

        Returns:
            Reconstructions (B, 3, H, W), and the KL divergence averaged over latent values, (B,).
        """
        posterior = self.vae.encode(images).latent_dist
        std = posterior.std
        if self.latent_noise:  # variances of independent noises add up
            axes = dict(dim=(0, 2, 3), keepdim=True)
            variance = posterior.mean.var(**axes) + posterior.var.mean(**axes)  # of each channel
            std = (posterior.var + self.latent_noise**2 * variance.detach()).sqrt()
        latents = posterior.mean + std * noise
        return self.vae.decode(latents).sample, posterior.kl() / noise[0].numel()


def train_autoencoder(config: AutoencoderTrainingConfig) -> dict[str, float]:
    """Train an autoencoder, write it to ``config.output`` and return its measurements.

    Raises:
        UserError: bad data, an existing output folder, or sizes that are not divisible.
    """
    config.check_paths()
    set_seed(config.seed)  # gives every process the same initial weights
    vae = load_autoencoder(config.initial) if config.initial else _new_autoencoder(config)
    vae = vae.train().requires_grad_(True)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if min(config.num_steps, config.batch_size) < 1 or config.num_held_out < 0:
        raise UserError("num_steps and batch_size must be at least 1, num_held_out at least 0")
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by the number of processes, "
            f"{accelerator.num_processes}"
        )
    noise_shape = latent_shape(vae, config.image_size)
    images = open_images(
        config.data,
        config.image_size,
        skip_unreadable=config.skip_unreadable,
        progress=accelerator.is_main_process,
    )
    order = np.random.default_rng(config.seed).permutation(len(images))
    held_out, training = order[: config.num_held_out], order[config.num_held_out :]
    if len(training) < config.batch_size:
        raise UserError(
            f"data {config.data} has {len(images)} images, too few for num_held_out "
            f"{config.num_held_out} and batch_size {config.batch_size}"
        )

    model = _Autoencode(vae, config.latent_noise)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(config.num_steps))
    model, optimizer = accelerator.prepare(model, optimizer)
    distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    generator = torch.Generator().manual_seed(config.seed + accelerator.process_index)
    batches = read_batches(
        images,
        _batch_indices(training, config, accelerator.process_index, accelerator.num_processes),
        config.num_workers,
    )
    with progress_bar(
        config.num_steps, desc="training", unit="step", enabled=accelerator.is_main_process
    ) as progress:
        for step, (batch, _) in enumerate(batches):
            pixels = to_float(batch)
            if config.horizontal_flip:
                mirrored = torch.rand(len(pixels), generator=generator) < 0.5
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
            noise = torch.randn(len(pixels), *noise_shape, generator=generator)
            pixels, noise = pixels.to(accelerator.device), noise.to(accelerator.device)
            decoded, kl = model(pixels, noise)
            error, kl = distance(decoded, pixels), kl.mean()
            accelerator.backward(error + config.kl_weight * kl)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            if step % 50 == 0 or step == config.num_steps - 1:
                values = [error.item(), kl.item()]
                if not all(map(math.isfinite, values)):
                    raise UserError(
                        f"the loss is not finite at step {step}: use a learning_rate below "
                        f"{config.learning_rate}"
                    )
                psnr = 10 * math.log10(4 / F.mse_loss(decoded.detach(), pixels).item())
                progress.set_postfix_str(
                    f"{config.reconstruction} {values[0]:.4f}  KL {values[1]:.3f}  "
                    f"PSNR {psnr:.1f} dB",
                    refresh=False,
                )

    accelerator.wait_for_everyone()
    metrics: dict[str, float] = {}
    if accelerator.is_main_process:
        vae = vae.eval().requires_grad_(False)
        vae.register_to_config(sample_size=config.image_size)
        measured = held_out if len(held_out) else training
        metrics = _measure(vae, images, training, measured, config)
        output = _write_results(vae, images, measured, metrics, config)
        print(f"wrote {output}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    accelerator.wait_for_everyone()
    return metrics


def _new_autoencoder(config: AutoencoderTrainingConfig) -> AutoencoderKL:
    shape = config.autoencoder
    widths = shape.block_out_channels
    if not widths or any(width < 1 or width % shape.norm_num_groups for width in widths):
        raise UserError(
            f"autoencoder.block_out_channels is {widths}: each width must be a multiple of "
            f"autoencoder.norm_num_groups, {shape.norm_num_groups}"
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=shape.layers_per_block,
        latent_channels=shape.latent_channels,
        norm_num_groups=shape.norm_num_groups,
        mid_block_add_attention=shape.mid_block_attention,
        sample_size=config.image_size,
    )


def _batch_indices(
    indices: np.ndarray, config: AutoencoderTrainingConfig, rank: int, world_size: int
) -> Iterator[list[int]]:
    """Yield this rank's part of each of ``num_steps`` global batches; shuffle in each epoch."""
    size = config.batch_size
    per_epoch = len(indices) // size
    for step in range(config.num_steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = np.random.default_rng((config.seed, epoch)).permutation(indices)
        yield order[position * size : (position + 1) * size][rank::world_size].tolist()


def _warmup_cosine(num_steps: int) -> Callable[[int], float]:
    """Return a schedule: linear warm-up in 2 % of the steps, then a cosine decay to zero."""
    warmup = num_steps // 50

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

    return factor


def _measure(
    vae: AutoencoderKL,
    images: ImageSet,
    training: np.ndarray,
    held_out: np.ndarray,
    config: AutoencoderTrainingConfig,
) -> dict[str, float]:
    """Set ``scaling_factor`` to 1/std of the latents and measure the autoencoder.

    PSNR in dB is averaged over the held-out images. It is measured from the posterior mean, from a
    posterior sample, and from the mean plus noise of 0.1 standard deviations of the latents.
    """
    generator = torch.Generator().manual_seed(config.seed)

    def moments_of(indices: np.ndarray) -> Tensor:
        parts = [
            encode_moments(vae, to_float(load_batch(images, part)[0]).to(vae.device)).cpu()
            for part in np.array_split(indices, -(-len(indices) // config.batch_size))
        ]
        return torch.cat(parts)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    moments = moments_of(training[:4096])
    latents = sample_posterior(moments, normal(moments.chunk(2, 1)[0]), LatentScaling(1.0))
    vae.register_to_config(scaling_factor=1.0 / float(latents.std()), shift_factor=None)

    pixels = to_float(load_batch(images, held_out)[0])
    moments = moments_of(held_out)
    scaling = latent_scaling(vae)
    mean = sample_posterior(moments, torch.zeros(()), scaling)
    noise = normal(mean)

    def psnr(latents: Tensor) -> float:
        parts = latents.split(config.batch_size)
        decoded = torch.cat([decode_latents(vae, part.to(vae.device)).cpu() for part in parts])
        errors = (decoded - pixels).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
        return float((10 * torch.log10(4 / errors)).mean())

    return {
        "psnr": psnr(mean),
        "psnr_posterior_sample": psnr(sample_posterior(moments, noise, scaling)),
        "psnr_noise_0.1": psnr(mean + 0.1 * noise),
        "posterior_std": float(torch.exp(0.5 * moments.chunk(2, 1)[1]).mean()) * scaling.factor,
        "scaling_factor": scaling.factor,
        "latent_mean": float(latents.mean()) * scaling.factor,
        "latent_kurtosis": float((latents - latents.mean()).pow(4).mean() / latents.var() ** 2),
    }


def _write_results(
    vae: AutoencoderKL,
    images: ImageSet,
    indices: np.ndarray,
    metrics: dict[str, float],
    config: AutoencoderTrainingConfig,
) -> Path:
    """Write weights, settings, metrics and a picture of reconstructions; return the folder."""
    output = Path(config.output)
    if output.exists():  # created during training; keep the result under another name
        output = output.with_name(f"{output.name}-{os.getpid()}")
    with atomic_output(output) as aside:
        vae.save_pretrained(aside, safe_serialization=True)
        save_config(config, aside / "training.yaml")
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        before, _ = load_batch(images, indices[:24])
        latents = sample_posterior(
            encode_moments(vae, to_float(before).to(vae.device)),
            torch.zeros((), device=vae.device),
            latent_scaling(vae),
        )
        after = to_pixels(decode_latents(vae, latents)).numpy()
        grid = Image.fromarray(_before_after(before, after))
        enlarge = max(1, 64 // config.image_size)  # small images are hard to judge by eye
        grid = grid.resize((grid.width * enlarge, grid.height * enlarge), Image.Resampling.NEAREST)
        grid.save(aside / "reconstructions.png")
    return output


def _before_after(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Arrange originals above their reconstructions, both uint8 (N, S, S, 3), in rows of eight."""
    _, size, _, channels = before.shape
    gap = max(2, size // 16)
    rows = []
    for start in range(0, len(before), 8):
        for part in (before[start : start + 8], after[start : start + 8]):
            row = np.full((size, 8 * size, channels), 255, np.uint8)
            row[:, : len(part) * size] = part.transpose(1, 0, 2, 3).reshape(size, -1, channels)
            rows.append(row)
        rows.append(np.full((gap, 8 * size, channels), 255, np.uint8))
    return np.concatenate(rows[:-1])
