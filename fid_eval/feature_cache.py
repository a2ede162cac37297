"""Keep features in files, by the content hash of the images and the weights of the network."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic_write import atomic_path
from .networks.extractors import Extractor
from .sets.image_set import ImageSet


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
    return folder


def _chunk_file(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk:06d}.safetensors"


def save_chunk(folder: Path, chunk: int, values: dict[str, Tensor]) -> None:
    """Save the features of a chunk."""
    with atomic_path(_chunk_file(folder, chunk)) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in values.items()}, temporary)


def load_chunk(folder: Path, chunk: int, count: int) -> dict[str, Tensor] | None:
    """Load a cached chunk; return None if it is missing, damaged or not of ``count`` images."""
    try:
        values = load_file(_chunk_file(folder, chunk))
    except (SafetensorError, OSError):
        return None
    return values if len(values.get("pool", ())) == count else None
