"""Load an autoencoder, encode images into latents, and decode latents into images.

``"digits"`` names the small autoencoder that ships with the package. A local folder or a Hub id
names any other ``AutoencoderKL`` of diffusers. ``moh-dit autoencoder`` trains one on your images.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .common.errors import UserError
from .common.hub import snapshot
from .common.paths import require_autoencoder

EMBEDDED = {"digits": Path(__file__).parent / "embedded" / "digits_autoencoder"}
WEIGHTS = "diffusion_pytorch_model*.safetensors"
# Files to download from a Hub repository of an autoencoder, or of a pipeline with one in vae/.
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]
HUB_FILES = [*VAE_FILES, *(f"vae/{name}" for name in VAE_FILES)]


class LatentScaling(NamedTuple):
    """Affine map from the autoencoder's latents to the diffusion model's: (z − shift) · factor."""

    factor: float
    shift: float = 0.0


def load_autoencoder(name_or_path: str | Path) -> AutoencoderKL:
    """Load an autoencoder: float32, in evaluation mode, frozen, on the CPU.

    Args:
        name_or_path: ``"digits"`` (embedded), a folder written by diffusers (also a whole pipeline
            with the autoencoder in ``vae/``), or a Hub id such as ``stabilityai/sd-vae-ft-ema``.

    Raises:
        UserError: the autoencoder does not exist, cannot be downloaded, or is not supported, or its
            weights are not safetensors.
    """
    require_autoencoder(name_or_path)
    name = str(name_or_path)
    folder = EMBEDDED.get(name, Path(name))
    vae = _load_local(folder, name) if folder.is_dir() else _load_from_hub(name)
    latent_scaling(vae)  # raises for a scaling that is not supported
    return vae.float().eval().requires_grad_(False)


def latent_scaling(vae: AutoencoderKL) -> LatentScaling:
    """Return the scaling in the autoencoder's configuration.

    Raises:
        UserError: the autoencoder normalises each latent channel separately.
    """
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise UserError(
            "this autoencoder normalises its latents per channel (latents_mean, latents_std), "
            "which is not supported: use one that has only scaling_factor and shift_factor"
        )
    return LatentScaling(float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0))


def downsampling_factor(vae: AutoencoderKL) -> int:
    """Return the number of image pixels per latent position along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of square images.

    Raises:
        UserError: the image size is not divisible by the downsampling factor.
    """
    factor = downsampling_factor(vae)
    if image_size % factor:
        raise UserError(
            f"image size {image_size} is not divisible by the autoencoder's factor {factor}: "
            f"use {max(1, image_size // factor) * factor} or {(image_size // factor + 1) * factor}"
        )
    return vae.config.latent_channels, image_size // factor, image_size // factor


def autoencoder_identity(vae: AutoencoderKL) -> str:
    """Return a SHA-256 over the names and float32 values of all weights, as hexadecimal text.

    Copies of the same weights have the same identity, wherever they were loaded from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in −1 … 1 to posterior moments, float32 (B, 2C, h, w).

    The moments are the unscaled mean and log-variance.
    """
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


def sample_posterior(moments: Tensor, noise: Tensor, scaling: LatentScaling) -> Tensor:
    """Draw scaled latents, float32 (B, C, h, w), from the posterior.

    Args:
        moments: mean and log-variance, (B, 2C, h, w).
        noise: standard normal noise, (B, C, h, w); zeros give the posterior mean.
        scaling: scaling of the autoencoder.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise - scaling.shift) * scaling.factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to images, float32 (B, 3, H, W), clipped to −1 … 1."""
    scaling = latent_scaling(vae)
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.to(vae.dtype) / scaling.factor + scaling.shift).sample
    return images.float().clamp(-1, 1)


def _load_local(folder: Path, name: str) -> AutoencoderKL:
    """Load an autoencoder or the ``vae`` of a pipeline; ``name`` is used in messages."""
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"autoencoder {name} has no config.json")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"{folder / 'config.json'} is not a diffusers configuration") from None
    if kind != "AutoencoderKL":
        raise UserError(f"{folder / 'config.json'} describes {kind}, not an AutoencoderKL")
    if not list(folder.glob(WEIGHTS)):
        raise UserError(
            f"autoencoder {name} has no diffusion_pytorch_model.safetensors, and pickle files such "
            "as .bin are not loaded: save it with save_pretrained(..., safe_serialization=True)"
        )
    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # diffusers raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"autoencoder {name} cannot be loaded: {reason[:200]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            raise UserError(
                f"autoencoder {name}: weights and config.json do not match: {len(keys)} "
                f"{problem.replace('_', ' ')}, for example {keys[0]}"
            )
    return vae


def _load_from_hub(name: str) -> AutoencoderKL:
    """Load an autoencoder from the local cache, which needs no network, or download it."""
    vae = None
    with contextlib.suppress(UserError):
        vae = _load_local(snapshot(name, HUB_FILES, local_files_only=True), name)
    if vae is None:
        try:
            folder = snapshot(name, HUB_FILES)
        except UserError as error:
            raise UserError(f"autoencoder {error}") from None
        vae = _load_local(folder, name)
    vae.register_to_config(_name_or_path=name)  # instead of the folder in the cache
    return vae
