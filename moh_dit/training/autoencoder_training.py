"""Train an autoencoder on any images, with a reconstruction loss and a KL loss.

The loss is ``reconstruction + perceptual_weight · LPIPS + kl_weight · KL``. The reconstruction
error is averaged over pixels, the KL divergence over latent values (Kingma & Welling 2014, eq. 10,
with the weight of β-VAE).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from fid_eval.progress import progress_bar

from ..autoencoder import latent_scaling, latent_shape, load_autoencoder
from ..common.atomic_write import remove
from ..common.distributed import own_folder, run_on_main_process
from ..common.errors import UserError
from ..common.folder_lock import FolderLock
from ..data.images import ImageSet, open_images
from ..data.pixels import to_float
from .autoencoder_checkpoint import AutoencoderCheckpoint
from .autoencoder_config import AutoencoderTrainingConfig
from .autoencoder_results import measure, write_results
from .image_cache import CachedImages, decoded_gib, pixel_batches
from .perceptual import PerceptualLoss
from .preemption import PREEMPTED, Preemption


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
        moments = self.vae.encode(images).latent_dist.parameters
        with torch.autocast(images.device.type, enabled=False):
            posterior = DiagonalGaussianDistribution(moments.float())
            std = posterior.std
            if self.latent_noise:  # variances of independent noises add up
                axes = dict(dim=(0, 2, 3), keepdim=True)
                variance = posterior.mean.var(**axes) + posterior.var.mean(**axes)  # of a channel
                std = (posterior.var + self.latent_noise**2 * variance.detach()).sqrt()
            latents = posterior.mean + std * noise
            kl = posterior.kl() / noise[0].numel()
        return self.vae.decode(latents).sample, kl


def train_autoencoder(config: AutoencoderTrainingConfig) -> dict[str, float]:
    """Train an autoencoder, write it to ``config.output`` and return its measurements.

    After SIGTERM, save a checkpoint and exit with code 75.

    Raises:
        UserError: bad data, an output folder that exists or is in use, sizes that are not
            divisible, or a checkpoint of other settings.
        SystemExit: code 75 after SIGTERM.
    """
    preemption = Preemption()
    config.check_paths()
    set_seed(config.seed)  # gives every process the same initial weights
    vae = _load_initial(config.init_from) if config.init_from else _new_autoencoder(config)
    vae = vae.train().requires_grad_(True)
    accelerator = _make_accelerator(config)
    config.check_values(accelerator.num_processes)
    latent_shape(vae, config.image_size)  # raises for a size that is not divisible
    perceptual = PerceptualLoss(config, accelerator) if config.perceptual_weight else None
    with own_folder(accelerator, config.partial) as lock:
        return _train_and_measure(vae, perceptual, config, accelerator, preemption, lock)


def _train_and_measure(
    vae: AutoencoderKL,
    perceptual: PerceptualLoss | None,
    config: AutoencoderTrainingConfig,
    accelerator: Accelerator,
    preemption: Preemption,
    lock: FolderLock,
) -> dict[str, float]:
    images = open_images(
        config.data,
        config.image_size,
        skip_unreadable=config.skip_unreadable,
        check=True,
        progress=accelerator.is_main_process,
    )
    order = np.random.default_rng(config.seed).permutation(len(images))
    held_out, training = order[: config.num_held_out], order[config.num_held_out :]
    if len(training) < config.batch_size:
        raise UserError(
            f"data {config.data} has {len(images)} images, too few for num_held_out "
            f"{config.num_held_out} and batch_size {config.batch_size}"
        )
    with Preemption.blocked():  # data-loader workers inherit the blocked SIGTERM
        images = _cache_if_small(images, config, accelerator)
    with preemption.deferred():
        stopped = _train(vae, perceptual, images, training, config, accelerator, preemption, lock)
        metrics = None
        if not stopped:
            measured = held_out if len(held_out) else training
            metrics = run_on_main_process(
                accelerator, lambda: _finish(vae, images, training, measured, config)
            )
    if metrics is None:
        accelerator.print(f"stopped by SIGTERM, saved {config.partial}; continue with --resume")
        raise SystemExit(PREEMPTED)
    return metrics


def _make_accelerator(config: AutoencoderTrainingConfig) -> Accelerator:
    """Join the process group, if there is one, and set precision and algorithms."""
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    if config.allow_tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
    )


def _cache_if_small(
    images: ImageSet, config: AutoencoderTrainingConfig, accelerator: Accelerator
) -> ImageSet:
    """Decode all images now if they fit into ``cache_images_gib``; print the decision."""
    size = decoded_gib(images)
    fits = size <= config.cache_images_gib
    accelerator.print(
        f"{len(images)} images, decoded {size:.3g} GiB: "
        + ("kept in memory" if fits else "read again in each epoch")
        + f" (cache_images_gib {config.cache_images_gib:g})"
    )
    if not fits:
        return images
    return CachedImages(images, config.num_workers, progress=accelerator.is_main_process)


def _train(
    vae: AutoencoderKL,
    perceptual: PerceptualLoss | None,
    images: ImageSet,
    training: np.ndarray,
    config: AutoencoderTrainingConfig,
    accelerator: Accelerator,
    preemption: Preemption,
    lock: FolderLock,
) -> bool:
    """Train up to ``num_steps`` and save checkpoints; return whether SIGTERM stopped it."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    device, in_bf16 = accelerator.device, config.mixed_precision == "bf16"
    module = _Autoencode(vae, config.latent_noise)
    # Eager group normalization on GPUs copies channels-last memory; compiled code does not.
    channels_last = in_bf16 or (config.compile and device.type == "cuda")
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    module.to(memory_format=memory_format)
    if config.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    adamw = torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True if in_bf16 or device.type == "cuda" else None,
    )
    model, optimizer = accelerator.prepare(module, adamw)
    sha256 = perceptual.sha256 if perceptual is not None else None
    checkpoint = AutoencoderCheckpoint(config, accelerator, images, vae, adamw, sha256)
    start = checkpoint.restore() if config.resume else 0
    if start == config.num_steps:
        return False
    lr_factor = _warmup_cosine(config.num_steps)
    distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    generator = torch.Generator(device)
    noise_shape = (config.batch_size // world_size, *latent_shape(vae, config.image_size))
    batches = pixel_batches(
        images,
        _batch_indices(training, config, rank, world_size, start),
        config.num_workers,
        device,
    )
    progress = progress_bar(
        config.num_steps, desc="training", unit="step", initial=start,
        enabled=accelerator.is_main_process,
    )  # fmt: skip
    with closing(batches), progress:
        with Preemption.blocked():  # data-loader workers inherit the blocked SIGTERM
            first = next(batches)
        for step, batch in enumerate(chain([first], batches), start):
            mirrored, noise = _draw(config, noise_shape, step, rank, generator)
            pixels = to_float(batch)
            if mirrored is not None:
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
            pixels = pixels.to(memory_format=memory_format)
            decoded, kl = model(pixels, noise)
            error, kl = distance(decoded, pixels), kl.mean()
            loss = error + config.kl_weight * kl
            if perceptual is not None:
                loss = loss + config.perceptual_weight * perceptual(decoded, pixels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for group in adamw.param_groups:
                group["lr"] = config.learning_rate * lr_factor(step)
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
            stop = preemption.should_stop(accelerator, step + 1)
            last = step == config.num_steps - 1
            save = stop or last or (step + 1) % config.checkpoint_every == 0
            if step % 50 == 0 or save:
                values = [error.item(), kl.item()]  # the only wait for the GPU
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
            if save:
                lock.check()
                checkpoint.save(step + 1)
            if stop:
                return True
    return False


def _draw(
    config: AutoencoderTrainingConfig,
    noise_shape: tuple[int, ...],
    step: int,
    rank: int,
    generator: torch.Generator,
) -> tuple[Tensor | None, Tensor]:
    """Draw the random numbers of a step on the device of ``generator``.

    They depend only on the seed, the step and the rank, so a resumed training repeats no draws.

    Returns:
        Which images to mirror, bool (B,), and the noise.
    """
    state = np.random.SeedSequence((config.seed, step, rank)).generate_state(1, np.uint64)
    generator.manual_seed(int(state[0]))
    options: dict[str, Any] = dict(generator=generator, device=generator.device)
    mirrored = None
    if config.horizontal_flip:
        mirrored = torch.rand(noise_shape[0], **options) < 0.5
    return mirrored, torch.randn(noise_shape, **options)


def _finish(
    vae: AutoencoderKL,
    images: ImageSet,
    training: np.ndarray,
    measured: np.ndarray,
    config: AutoencoderTrainingConfig,
) -> dict[str, float]:
    """Measure the autoencoder, write the output and remove the checkpoints."""
    vae = vae.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    vae.register_to_config(sample_size=config.image_size)
    with torch.compiler.set_stance("force_eager"):
        metrics = measure(vae, images, training, measured, config)
        output = write_results(vae, images, measured, metrics, config)
    remove(config.partial)
    print(f"wrote {output}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return metrics


def _load_initial(name: str) -> AutoencoderKL:
    vae = load_autoencoder(name)
    if type(vae) is not AutoencoderKL or isinstance(latent_scaling(vae).factor, Tensor):
        raise UserError(
            f"init_from {name} is an {type(vae).__name__} whose training is not supported: give an "
            "AutoencoderKL without latents_mean and latents_std"
        )
    return vae


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
    indices: np.ndarray,
    config: AutoencoderTrainingConfig,
    rank: int,
    world_size: int,
    start: int = 0,
) -> Iterator[list[int]]:
    """Yield this rank's part of each global batch after step ``start``; shuffle in each epoch."""
    size = config.batch_size
    per_epoch = len(indices) // size
    for step in range(start, config.num_steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
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
