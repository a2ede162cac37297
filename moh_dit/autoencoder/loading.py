"""Load an autoencoder by name: the embedded one, pixels, a local folder or a Hub id."""

import contextlib
import importlib.util
import json
import pickle
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..common.errors import UserError
from ..common.hub import snapshot
from ..common.paths import require_autoencoder
from .adapters import adapter_class
from .codec import autoencoder_class, latent_layout, latent_scaling
from .pixel_autoencoder import PixelAutoencoder

EMBEDDED = {"digits": Path(__file__).parents[1] / "embedded" / "digits_autoencoder"}
MAX_LAYERS = 4096  # no autoencoder has more layers or channels
PIXELS = "none"  # name of the autoencoder that uses pixels as latents
WEIGHTS = "diffusion_pytorch_model*.safetensors"
# Mean and standard deviation per latent channel, as published beside the weights of VA-VAE.
STATISTICS_FILES = ("latents_stats.safetensors", "latents_stats.pt")
# Files to download from a Hub repository of an autoencoder, or of a pipeline with one in vae/.
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors", *STATISTICS_FILES]
HUB_FILES = [*VAE_FILES, *(f"vae/{name}" for name in VAE_FILES)]


def load_autoencoder(name_or_path: str | Path) -> ModelMixin:
    """Load an autoencoder: float32, in evaluation mode, frozen, on the CPU.

    Args:
        name_or_path: ``"digits"`` (embedded), ``"none"`` (pixels are the latents), a folder
            written by diffusers (also a whole pipeline with the autoencoder in ``vae/``), or a Hub
            id such as ``stabilityai/sd-vae-ft-ema``.

    Raises:
        UserError: the autoencoder does not exist, cannot be downloaded, or is not supported, or its
            weights are not safetensors.
    """
    require_autoencoder(name_or_path)
    name = str(name_or_path)
    if name == PIXELS:
        return PixelAutoencoder().eval()
    folder = EMBEDDED.get(name, Path(name))
    vae = _load_local(folder, name) if folder.is_dir() else _load_from_hub(name)
    try:
        latent_layout(vae)
        latent_scaling(vae)
    except UserError as error:
        raise UserError(f"autoencoder {name}: {error}") from None
    return vae.float().eval().requires_grad_(False)


def _load_local(folder: Path, name: str) -> ModelMixin:
    """Load an autoencoder or the ``vae`` of a pipeline; ``name`` is used in messages."""
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"autoencoder {name} has no config.json")
    kind = stored_class(folder, f"autoencoder {name}")
    if not list(folder.glob(WEIGHTS)):
        raise UserError(
            f"autoencoder {name} has no diffusion_pytorch_model.safetensors, and pickle files such "
            "as .bin are not loaded: save it with save_pretrained(..., safe_serialization=True)"
        )
    try:
        vae, report = kind.from_pretrained(
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
    if statistics := next((f for n in STATISTICS_FILES if (f := folder / n).is_file()), None):
        _set_statistics(vae, statistics)
    return vae


def stored_class(folder: Path, source: str) -> type[ModelMixin]:
    """Return the class that the ``config.json`` in a folder of an autoencoder names.

    Args:
        folder: folder with ``config.json``.
        source: names the autoencoder in error messages.

    Raises:
        UserError: the file is not a configuration, the class is not supported, or a package that it
            needs is not installed.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config.get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{folder / 'config.json'} is not a diffusers configuration") from None
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        counts_layers = ("layer" in key or "block" in key) and "channels" not in key
        numbers = [number for number in values if isinstance(number, int)]
        if len(values) > MAX_LAYERS or (counts_layers and sum(numbers) > MAX_LAYERS):
            raise UserError(f"{source}: {key} in config.json stands for more than "
                            f"{MAX_LAYERS} layers; the file is damaged")  # fmt: skip
    package = adapter_class(name, source).requires
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{source} is an {name}, which needs {package}: pip install {package}")
    return autoencoder_class(name)


def _set_statistics(vae: ModelMixin, file: Path) -> None:
    """Put the statistics of a file into the configuration: latents are (z − mean) / std.

    Raises:
        UserError: the file is damaged, or the configuration contains other statistics.
    """
    if getattr(vae.config, "latents_mean", None) is not None:
        raise UserError(
            f"config.json contains latents_mean, and {file} contains statistics, too: remove one"
        )
    try:
        read = load_file if file.suffix == ".safetensors" else _load_weights_only
        stored = read(file)
        mean, std = (stored[name].float().flatten().tolist() for name in ("mean", "std"))
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError,
            SafetensorError, pickle.UnpicklingError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not contain the tensors mean and std ({reason})") from None
    vae.register_to_config(
        latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None
    )


def _load_weights_only(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_from_hub(name: str) -> ModelMixin:
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
