"""Open labelled images of any source as uint8 pixels of one size, and read them in batches.

Images are not mirrored here. The trainer draws flips for each batch, which makes resuming exact.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UserError
from ..common.paths import require_data
from .hugging_face import HubImages, is_hub_source, is_stream
from .image_folders import DigitImages, ImageFolder
from .tar_shards import TarImages, tar_shards


class ImageSet(Protocol):
    """A map-style data set of labelled square images of one size."""

    image_size: int
    class_names: list[str]
    labels: np.ndarray  # int64 (N,), index into class_names

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return image ``index`` as uint8 (image_size, image_size, 3), and its label."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the data set and changes when its data changes."""


def open_images(
    source: str | Path, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
) -> ImageSet:
    """Open a data set of any supported kind; list and check all images first.

    Args:
        source: ``"digits"`` (embedded), a folder whose sub-folders are the classes
            (``ImageFolder``), tar shards as a folder, a file or a pattern (``TarImages``), or a
            Hugging Face data set ``hf://OWNER/NAME`` (``HubImages``).
        image_size: side of the returned images in pixels.
        skip_unreadable: skip images that cannot be read and report their number, instead of
            raising an error.
        progress: show a progress bar during the check.

    Raises:
        UserError: a missing or empty folder, a class without images, images outside the class
            folders, or an unreadable image. The message names the file.
    """
    if image_size < 1:
        raise UserError(f"image_size is {image_size}: it must be at least 1")
    require_data(source)
    if str(source) == "digits":
        return DigitImages(image_size)
    if is_stream(source):
        raise UserError(
            f"data {source} is a stream, which is read from start to end, but images are needed in "
            "random order: encode it once with moh-dit encode and train from data.latents, or "
            "remove streaming=true"
        )
    options = dict(skip_unreadable=skip_unreadable, progress=progress)
    if is_hub_source(source):
        return HubImages(str(source), image_size, **options)
    if shards := tar_shards(source):
        return TarImages(shards, image_size, **options)
    return ImageFolder(Path(source), image_size, **options)


def load_batch(images: ImageSet, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read the images with these indices: uint8 (B, S, S, 3), and labels int64 (B,)."""
    pairs = [images[i] for i in indices]
    return np.stack([image for image, _ in pairs]), np.array([y for _, y in pairs], np.int64)


def index_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut ``indices`` into consecutive batches. The last batch may be shorter."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def read_batches(
    images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``load_batch`` of each batch of indices, read ahead by data-loader workers.

    Raises:
        UserError: an image that cannot be read, with the same message from any worker.
    """
    loader: DataLoader = DataLoader(
        _BatchReader(images),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_keep_numpy,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _BatchReader(Dataset):
    """Reads batches, and returns a ``UserError`` as a value.

    If a data-loader worker raised it, the user would see a traceback.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | UserError:
        try:
            return load_batch(self.images, indices)
        except UserError as error:
            return error


def _keep_numpy(batch: object) -> object:
    """Return the batch unchanged; the default ``collate_fn`` would convert it to tensors."""
    return batch
