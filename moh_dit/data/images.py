"""Image sets: labelled uint8 images of one size, opened by ``open_images`` whatever they are.

Random flips are not done here: whoever trains draws them per batch, so that resume is exact.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UserError
from .hugging_face import PREFIX as HUB
from .hugging_face import HubImages, is_stream
from .image_folders import DigitImages, ImageFolder
from .tar_shards import TarImages, tar_shards


class ImageSet(Protocol):
    """A map-style data set of labelled images, all preprocessed to one square size."""

    image_size: int
    class_names: list[str]
    labels: np.ndarray  # int64 (N,), index into class_names

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return image ``index`` as uint8 (image_size, image_size, 3), and its label."""

    def fingerprint(self) -> str:
        """SHA-256 over what tells this data set from another: changes when the data does."""


def open_images(
    source: str | Path, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
) -> ImageSet:
    """Open a data set of whatever kind; everything is listed and checked before work starts.

    Args:
        source: ``"digits"`` (embedded), a folder whose sub-folders are the classes
            (``ImageFolder``), tar shards as a folder, a file or a pattern (``TarImages``), or
            ``hf:`` and a Hugging Face data set (``HubImages``).
        image_size: side of the returned images in pixels.
        skip_unreadable: leave out images that cannot be read and say how many, instead of raising.
        progress: show a progress bar over the check.

    Raises:
        UserError: a missing or empty folder, a class without images, images beside the classes,
            an unreadable image (named).
    """
    if image_size < 1:
        raise UserError(f"image size {image_size}: must be at least 1 pixel")
    if str(source) == "digits":
        return DigitImages(image_size)
    if is_stream(source):
        raise UserError(
            f"data {source} can only be read from start to end, and images are needed in any "
            "order: encode it once with moh-dit-encode and train from data.latents, or use hf:"
        )
    options = dict(skip_unreadable=skip_unreadable, progress=progress)
    if str(source).startswith(HUB):
        return HubImages(str(source), image_size, **options)
    if shards := tar_shards(source):
        return TarImages(shards, image_size, **options)
    return ImageFolder(Path(source), image_size, **options)


def load_batch(images: ImageSet, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read a few images at once: uint8 (B, S, S, 3) and int64 (B,)."""
    pairs = [images[i] for i in indices]
    return np.stack([image for image, _ in pairs]), np.array([y for _, y in pairs], np.int64)


def read_batches(
    images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``load_batch`` for each list of indices in turn, read ahead by loader processes.

    Raises:
        UserError: an image that cannot be read, in the words of whichever process met it.
    """
    loader: DataLoader = DataLoader(
        _BatchReader(images),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_is,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _BatchReader(Dataset):
    """Hands a user's mistake over as a value: raised in a worker, it would become a traceback."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | UserError:
        try:
            return load_batch(self.images, indices)
        except UserError as error:
            return error


def _as_is(batch: object) -> object:
    return batch
