"""The autoencoder between images and latents: open one, use it, train one for your own images.

``"digits"`` names the tiny one that ships with the package. Any other diffusers ``AutoencoderKL``,
a local folder or a hub id, takes its place. Train one with

    python -m moh_dit.autoencoder --data my_images --image_size 64 --output my_autoencoder
"""

import contextlib
import hashlib
import json
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from huggingface_hub import HfApi
from torch import Tensor

from .common.errors import UserError

EMBEDDED = {"digits": Path(__file__).parent / "embedded" / "digits_autoencoder"}
WEIGHTS = "diffusion_pytorch_model*.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class LatentScaling(NamedTuple):
    """The affine map from the autoencoder's latents to those the diffusion model sees."""

    factor: float
    shift: float = 0.0


def load_autoencoder(name_or_path: str | Path) -> AutoencoderKL:
    """Open an autoencoder: float32, in evaluation mode, frozen, on the CPU.

    Args:
        name_or_path: ``"digits"`` (embedded), a folder written by diffusers (also a whole pipeline
            with the autoencoder in ``vae/``), or a hub id such as ``stabilityai/sd-vae-ft-ema``.

    Raises:
        UserError: nothing found, no network for a hub id, or weights that are not safetensors.
    """
    name = str(name_or_path)
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_file():
        raise UserError(f"autoencoder {name} is a file: give the folder with its config.json")
    if folder.is_dir():
        vae = _load_local(folder)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        vae = _load_from_hub(name)
    else:
        raise UserError(
            f'autoencoder folder {name} does not exist: give "digits", a folder with config.json '
            "and diffusion_pytorch_model.safetensors, or a hub id"
        )
    latent_scaling(vae)  # says at once when the scaling is of a kind that is not supported
    return vae.float().eval().requires_grad_(False)


def choose_autoencoder(autoencoder: str | None, source: str | Path) -> str:
    """Return the autoencoder for a data set.

    Args:
        autoencoder: the user's choice; ``None`` for the default, which exists for the digits only.
        source: the data set.

    Raises:
        UserError: no autoencoder is given for a data set other than ``"digits"``.
    """
    if autoencoder is not None:
        return autoencoder
    if str(source) == "digits":
        return "digits"
    raise UserError(
        f"no autoencoder is given for {source}; set autoencoder to a folder or a hub id, for "
        "example stabilityai/sd-vae-ft-ema, or train one with moh-dit autoencoder"
    )


def latent_scaling(vae: AutoencoderKL) -> LatentScaling:
    """The scaling that the autoencoder's configuration asks for."""
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise UserError(
            "this autoencoder normalises its latents per channel (latents_mean, latents_std), "
            "which is not supported: use one with scaling_factor and shift_factor alone"
        )
    return LatentScaling(float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0))


def downsampling_factor(vae: AutoencoderKL) -> int:
    """Image pixels per latent position along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images; a UserError where the size does not divide."""
    factor = downsampling_factor(vae)
    if image_size % factor:
        raise UserError(
            f"image size {image_size} is not divisible by the autoencoder's factor {factor}: "
            f"use {max(1, image_size // factor) * factor} or {(image_size // factor + 1) * factor}"
        )
    return vae.config.latent_channels, image_size // factor, image_size // factor


def autoencoder_identity(vae: AutoencoderKL) -> str:
    """SHA-256 over the names and float32 values of all weights, as hexadecimal text.

    Two folders with the same weights are the same autoencoder; where it came from plays no part.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in −1 … 1 → posterior mean and log-variance, float32 (B, 2C, h, w)."""
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).float()


def sample_posterior(moments: Tensor, noise: Tensor, scaling: LatentScaling) -> Tensor:
    """Draw from the posterior and scale: (B, 2C, h, w) and normal (B, C, h, w) → (B, C, h, w)."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise - scaling.shift) * scaling.factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) → images, float32 (B, 3, H, W), clipped to −1 … 1."""
    scaling = latent_scaling(vae)
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.to(vae.dtype) / scaling.factor + scaling.shift).sample
    return images.float().clamp(-1, 1)


def _load_local(folder: Path) -> AutoencoderKL:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"autoencoder folder {folder} has no config.json")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"{folder / 'config.json'} is not a diffusers configuration") from None
    if kind != "AutoencoderKL":
        raise UserError(f"{folder / 'config.json'} describes {kind}, not an AutoencoderKL")
    _require_safetensors(f"autoencoder folder {folder}", [path.name for path in folder.iterdir()])
    return _from_pretrained(str(folder), local_files_only=True)


def _load_from_hub(name: str) -> AutoencoderKL:
    for subfolder in ("", "vae"):  # a copy in the local cache needs no network
        with contextlib.suppress(UserError):
            return _from_pretrained(name, subfolder=subfolder, local_files_only=True)
    try:
        found = HfApi().model_info(name, timeout=10).siblings or []
    except Exception as error:  # no network, no such repository, or a private one
        raise UserError(
            f"autoencoder {name}: there is no such folder, no copy in the local cache, and the "
            f"hub could not give it ({_one_line(error)}); without network, give the path of a "
            'local folder, or "digits"'
        ) from None
    names = [entry.rfilename for entry in found]
    subfolder = "" if "config.json" in names else "vae"
    inside = f"{subfolder}/" if subfolder else ""
    _require_safetensors(
        f"autoencoder {name} on the hub",
        [file.removeprefix(inside) for file in names if file.startswith(inside)],
    )
    return _from_pretrained(name, subfolder=subfolder)


def _require_safetensors(where: str, names: list[str]) -> None:
    if any(fnmatch(name, WEIGHTS) for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    found = f"only the pickle {pickles[0]}" if pickles else "no weights"
    raise UserError(
        f"{where}: expected diffusion_pytorch_model.safetensors, found {found}; save the "
        "autoencoder with save_pretrained(..., safe_serialization=True)"
    )


def _from_pretrained(name: str, **options: Any) -> AutoencoderKL:
    try:
        with warnings.catch_warnings():  # diffusers passes on an option that the hub has retired
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            vae, report = AutoencoderKL.from_pretrained(
                name,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever is wrong with the files, the user has to mend it
        raise UserError(f"autoencoder {name} cannot be opened: {_one_line(error)}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            raise UserError(
                f"autoencoder {name}: the weights do not fit config.json, {len(keys)} "
                f"{problem.replace('_', ' ')}, {keys[0]} among them"
            )
    return vae


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
