"""Measure a trained autoencoder and write it to its output folder."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..autoencoder import (
    LatentScaling,
    decode_latents,
    encode_moments,
    latent_scaling,
    sample_posterior,
)
from ..common.atomic_write import atomic_output
from ..common.cli import save_config
from ..data.images import ImageSet, load_batch
from ..data.pixels import to_float, to_pixels
from .autoencoder_config import AutoencoderTrainingConfig


def measure(
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
    factor = 1.0 / float(latents.std())
    vae.register_to_config(scaling_factor=factor, shift_factor=None)

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
        "posterior_std": float(torch.exp(0.5 * moments.chunk(2, 1)[1]).mean()) * factor,
        "scaling_factor": factor,
        "latent_mean": float(latents.mean()) * factor,
        "latent_kurtosis": float((latents - latents.mean()).pow(4).mean() / latents.var() ** 2),
    }


def write_results(
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
    with atomic_output(output, manifest=True) as aside:
        vae.save_pretrained(aside, safe_serialization=True)
        save_config(replace(config, resume=False), aside / "training.yaml")
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
