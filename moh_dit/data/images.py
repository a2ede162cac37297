"""Open labelled images of any source as uint8 pixels of one size, and read them in batches.

``fid_eval.sets`` lists, labels and decodes the images, so training and evaluation read them alike.
Images are not mirrored here. The trainer draws flips for each batch, which makes resuming exact.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from fid_eval.progress import progress_bar
from fid_eval.sets.classes import summarize_classes
from fid_eval.sets.decoding import Preprocess, describe_conversions
from fid_eval.sets.hugging_face import is_hub_url, parse_hub_url
from fid_eval.sets.opening import open_set
from fid_eval.sets.readers import ArrayReader

from ..common.errors import UserError
from ..common.paths import require_data
from .image_sources import DigitImages, ImageArrays, ImageFiles, user_errors


class ImageSet(Protocol):
    """A map-style data set of labelled square images of one size."""

    image_size: int
    class_names: list[str]

    @property
    def labels(self) -> np.ndarray:
        """Return the label of each image, int64 (N,): an index into class_names."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return image ``index`` as uint8 (image_size, image_size, 3), and its label."""

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the data set and changes when its data changes."""


def open_images(
    source: str | Path,
    image_size: int,
    *,
    skip_unreadable: bool = False,
    check: bool = False,
    earlier_classes: Sequence[str] | None = None,
    progress: bool = True,
) -> ImageSet:
    """Open a data set of any kind that ``fid_eval.sets.opening.open_set`` reads, and list it.

    Args:
        source: ``"digits"`` (embedded), a path or a Hugging Face data set; see docs/data.md.
        image_size: side of the returned images in pixels.
        skip_unreadable: skip images that cannot be read and report their number, instead of
            raising an error.
        check: read all images now. Otherwise an unreadable image is an error when it is used.
        earlier_classes: class names of an earlier run, whose order is kept if the class folders
            are the same.
        progress: print the number of images and classes, and show a progress bar for ``check``.

    Raises:
        UserError: a missing or empty set, labels that are missing or wrong, or an unreadable image.
            The message names the file.
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
    with user_errors("data "):
        opened = open_set(
            str(source),
            Preprocess(image_size, crop=True),
            check_headers=False,
            earlier_classes=earlier_classes,
        )
    if opened.images is None:
        raise UserError(f"data {source} holds statistics or features, but no images")
    if opened.missing_labels is not None:
        raise UserError(
            f"data {source} {opened.missing_labels}: put the images of each class into a folder, "
            "or choose another split"
        )
    images: ImageArrays | ImageFiles
    if isinstance(opened.images, ArrayReader):
        images = ImageArrays(opened, image_size)
    else:
        images = ImageFiles(opened, image_size)
        if check or skip_unreadable:
            _check_contents(images, skip_unreadable, progress)
    if progress:
        classes = summarize_classes(images.class_names)
        unlabelled = " (no labels)" if opened.labels is None and not opened.class_names else ""
        print(f"{source}: {len(images):,} images, {classes}{unlabelled}", file=sys.stderr)
        for remark in opened.remarks():
            print(remark, file=sys.stderr)
    return images


def _check_contents(images: ImageFiles, skip_unreadable: bool, progress: bool) -> None:
    """Read all images, and raise ``UserError`` for unreadable ones or remove them from the set."""
    reader = images.reader
    with (
        progress_bar(len(images), desc="checking images", unit="img", enabled=progress) as bar,
        user_errors("data "),
    ):
        bad = reader.check_contents(bar.update)
    if not bad:
        return
    if not skip_unreadable:
        raise UserError(
            f"data {images.source}: {reader.describe_bad(bad)}: repair or remove them, or set "
            "skip_unreadable to skip such images"
        )
    print(f"{images.source}: {reader.describe_bad(bad)}; they are skipped", file=sys.stderr)
    kept = np.setdiff1d(np.arange(len(images)), list(bad))
    if not len(kept):
        raise UserError(f"data {images.source}: none of the images can be read")
    lost = np.setdiff1d(images.labels, images.labels[kept])
    if len(lost):
        raise UserError(
            f"data {images.source}: no image of the class {images.class_names[lost[0]]} is readable"
        )
    reader.select(kept)


def is_stream(source: str | Path) -> bool:
    """Return whether ``source`` is a Hugging Face data set with ``streaming=true``."""
    with user_errors("data "):
        return is_hub_url(str(source)) and parse_hub_url(str(source)).streaming


def conversions_of(images: Any) -> Counter[str]:
    """Return the numbers of conversions that images count while they are read, to be updated."""
    counts: Counter[str] | None = getattr(images, "conversions", None)
    return Counter() if counts is None else counts


def print_conversions(source: str, counts: Iterable[Counter[str]]) -> None:
    """Print the conversions that all processes have counted, if there are any."""
    if line := describe_conversions(sum(counts, Counter())):
        print(f"{source}: {line}", file=sys.stderr)


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
    conversions = conversions_of(images)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        pixels, labels, counts = batch
        if num_workers:  # Otherwise they have been counted in this process.
            conversions.update(counts)
        yield pixels, labels


class _BatchReader(Dataset):
    """Reads batches with their conversions, and returns a ``UserError`` as a value.

    If a data-loader worker raised it, the user would see a traceback.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> tuple[Any, ...] | UserError:
        conversions = conversions_of(self.images)
        before = conversions.copy()
        try:
            return *load_batch(self.images, indices), conversions - before
        except UserError as error:
            return error


def _keep_numpy(batch: object) -> object:
    """Return the batch unchanged; the default ``collate_fn`` would convert it to tensors."""
    return batch
