"""Keep features in files, by the content hash of the images and the weights of the network."""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic_write import atomic_path, remove_leftovers
from .errors import describe_error
from .networks.extractors import Extractor
from .sets.decoding import POLICY_VERSION
from .sets.image_set import ImageSet

# The key of the checksum; safetensors writes several keys in random order.
CHECKSUM = f"sha256, decoding policy {POLICY_VERSION}"


def cache_folder(
    cache: Path | None, image_set: ImageSet, extractor: Extractor, precision: str
) -> Path | None:
    """Create and return the folder of a set's features, or None if they cannot be cached."""
    reader = image_set.images
    if cache is None or reader is None or reader.count is None:
        return None
    content, weights = image_set.content_hash(), extractor.sha256
    if content is None or weights is None:
        return None
    preprocess = str(getattr(reader, "preprocess", "none")).replace(" ", "-")
    run = f"{extractor.name}-{weights[:16]}-{precision}"
    folder = cache / run / f"{content[:32]}-{preprocess}"
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    return folder


def _chunk_file(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:06d}.safetensors"


def save_chunk(folder: Path, chunk: int, layers: dict[str, Tensor]) -> None:
    """Save the features of a chunk, with a checksum."""
    layers = {key: value.cpu().contiguous() for key, value in layers.items()}
    with atomic_path(_chunk_file(folder, chunk)) as temporary:
        save_file(layers, temporary, {CHECKSUM: _checksum(folder, chunk, layers)})


def load_chunk(
    folder: Path, chunk: int, count: int, dimensions: dict[str, int]
) -> tuple[dict[str, Tensor] | None, str | None]:
    """Load the features of a chunk.

    Args:
        folder: the folder of the set, from ``cache_folder``.
        chunk: index of the chunk.
        count: number of images in the chunk.
        dimensions: expected dimensions of the features by layer.

    Returns:
        The features by layer, or None, and why an existing file cannot be used, or None.
    """
    path = _chunk_file(folder, chunk)
    try:
        with safe_open(path, framework="pt") as file:
            layers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            checksum = metadata.get(CHECKSUM)
        if checksum is None and metadata:
            return None, f"{path.name} is of images decoded by another policy (docs/data.md)"
        if checksum is None:
            return None, f"{path.name} has no checksum, as files of fid-eval 0.1.0"
        if checksum != _checksum(folder, chunk, layers):
            return None, f"{path.name} has a wrong checksum"
        for key, value in layers.items():
            expected = (count, dimensions.get(key, value.shape[-1]))
            if value.shape != expected or not value.is_floating_point():
                return None, f"{path.name} holds {key} of shape {tuple(value.shape)}"
            if not value.isfinite().all():
                return None, f"{path.name} holds NaN or infinity"
    except FileNotFoundError:
        return None, None
    except Exception as error:  # of any type, because the file may be damaged in any way
        return None, f"{path.name} is damaged: {describe_error(error)}"
    return (layers, None) if "pool" in layers else (None, f"{path.name} holds no features")


def _checksum(folder: Path, chunk: int, layers: dict[str, Tensor]) -> str:
    """Return the SHA-256 of features and of the set, network and chunk to which they belong."""
    digest = hashlib.sha256(f"{folder.parent.name}/{folder.name}/{chunk}".encode())
    for key, value in sorted(layers.items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()
