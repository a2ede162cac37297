"""Choose the held-out images of a run, and report mistakes in the choice."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fid_eval.sets.archives import TAR_ENDINGS

from ..common.errors import UserError
from ..data.image_sources import ImageFiles, sha256
from ..data.images import ImageSet, index_batches
from ..data.latents import LatentSet

NAMES_IN_MESSAGE = 3
SET_ENDINGS = (".zip", ".npz", ".npy", *TAR_ENDINGS)  # of files that hold images


@dataclass(frozen=True)
class HeldOutSplit:
    """The images of a data set that a run trains on, and the held-out images.

    Both are ascending image indices, int64.
    """

    training: np.ndarray
    held_out: np.ndarray

    def identity(self) -> dict[str, Any]:
        """Return the number of held-out images, and a SHA-256 over their indices."""
        return {"images": len(self.held_out), "indices": sha256(self.held_out.astype(np.int64))}


def splits_data(held_out: float | str | None) -> bool:
    """Return whether this ``evaluation.held_out`` takes images away from the training data."""
    if isinstance(held_out, str):
        return Path(held_out).is_file() and not held_out.lower().endswith(SET_ENDINGS)
    return held_out is not None


def split_images(
    held_out: float | str, labels: np.ndarray, seed: int, source: str, images: ImageSet | None
) -> HeldOutSplit:
    """Split a data set into training images and held-out images.

    Args:
        held_out: a share of each class, or the path of a text file that lists images.
        labels: class of each image, int64 (N,).
        seed: seed of the share.
        source: name of the data, for names of images and for messages.
        images: the images, whose names the list may contain; ``None`` for latents.

    Raises:
        UserError: the list names an unknown image, no image, or all images; or no image is left
            for a class or for the held-out set.
    """
    if not isinstance(held_out, str):
        chosen = _draw_share(held_out, labels, seed)
    else:
        chosen = _read_list(Path(held_out), len(labels), source, images)
    if not chosen.any():
        reason = (
            "names no image"
            if isinstance(held_out, str)
            else "takes none, as classes are too small"
        )
        raise UserError(f"evaluation.held_out {held_out} {reason}; {source} has {len(labels)}")
    if chosen.all():
        raise UserError(
            f"evaluation.held_out {held_out} names all {len(labels)} images of {source}, so "
            "none is left to train on"
        )
    return HeldOutSplit(np.flatnonzero(~chosen), np.flatnonzero(chosen))


def _draw_share(share: float, labels: np.ndarray, seed: int) -> np.ndarray:
    """Choose a share of each class, at least one image of each class that has several."""
    random = np.random.default_rng((seed, 2))
    order = random.permutation(len(labels))
    by_class = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    chosen = np.zeros(len(labels), bool)
    start = 0
    for count in np.bincount(labels).tolist():
        number = min(max(round(share * count), 1), max(count - 1, 0))
        chosen[by_class[start : start + number]] = True
        start += count
    return chosen


def _read_list(path: Path, num_images: int, source: str, images: ImageSet | None) -> np.ndarray:
    """Choose the images that a text file lists by path or by number, one per line."""
    try:
        # utf-8-sig skips the byte order mark that Windows writes.
        lines = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.held_out {path} cannot be read as text: {error}") from None
    chosen = np.zeros(num_images, bool)
    unknown = set(lines)
    if isinstance(images, ImageFiles):
        for index in range(num_images):
            names = {images.name(index), os.path.relpath(images.name(index), source)} & lines
            chosen[index] = bool(names)
            unknown -= names
    for line in list(unknown):
        if line.isascii() and line.isdigit() and int(line) < num_images:
            chosen[int(line)] = True
            unknown.remove(line)
    if unknown:
        how = "a path or a number" if isinstance(images, ImageFiles) else "a number"
        raise UserError(
            f"evaluation.held_out {path} has {len(unknown)} lines that name no image of {source}, "
            f"for example {min(unknown)!r}; write one image per line, as {how} from 0 to "
            f"{num_images - 1}"
        )
    return chosen


def match_classes(names: Sequence[str], training: Sequence[str], held_out: str) -> np.ndarray:
    """Return the training label of each class of a separate held-out set, int64.

    Raises:
        UserError: the training data have no class of this name.
    """
    known = {name: label for label, name in enumerate(training)}
    for name in names:
        if name not in known:
            raise UserError(
                f"evaluation.held_out {held_out} has a class {name}, which the training data do "
                "not have; give images of the same classes"
            )
    return np.array([known[name] for name in names], np.int64)


def warn_of_small_sets(
    labels: np.ndarray, training_labels: np.ndarray, class_names: Sequence[str], batch_size: int
) -> None:
    """Warn about classes without held-out or training images, and about few held-out images.

    Args:
        labels: class of each held-out image.
        training_labels: class of each training image.
        class_names: name of each class.
        batch_size: images per training step.
    """
    for kind, present in (("held-out", labels), ("training", training_labels)):
        counts = np.bincount(present, minlength=len(class_names))
        if missing := [name for name, count in zip(class_names, counts, strict=True) if not count]:
            shown = ", ".join(missing[:NAMES_IN_MESSAGE])
            more = f" and {len(missing) - NAMES_IN_MESSAGE} more"
            warn(
                f"no {kind} images of class {shown}"
                f"{more if len(missing) > NAMES_IN_MESSAGE else ''}"
            )
    if len(labels) < batch_size:
        warn(
            f"{len(labels)} held-out images are fewer than one batch (batch_size {batch_size}), so "
            "the held-out loss is imprecise; hold out more images"
        )


def warn_of_overlap(
    held_out: ImageSet | LatentSet,
    indices: Sequence[int],
    data: ImageSet | LatentSet,
    training: Sequence[int],
) -> None:
    """Warn if held-out images have the same content as training images.

    Images in files are compared by the bytes of the files, other images by their pixels, and
    latents by their moments.

    Args:
        held_out: the data with the held-out images.
        indices: held-out images.
        data: the training data.
        training: training images.
    """
    hashes = list(_digests(held_out, indices))
    sizes = set(_sizes(held_out, indices))
    same_size = [
        i for i, size in zip(training, _sizes(data, training), strict=True) if size in sizes
    ]
    known = set(_digests(data, same_size))
    if count := sum(digest in known for digest in hashes):
        warn(
            f"{count} of {len(hashes)} held-out images have the same content as training images, "
            "so memorisation lowers the held-out loss as well; remove the duplicates"
        )


def _sizes(data: ImageSet | LatentSet, indices: Sequence[int]) -> Iterator[int]:
    """Yield the size of each encoded file, to skip most files when content is compared."""

    def size(index: int) -> int:
        if not isinstance(data, ImageFiles):
            return 0
        with data.open_file(index) as file:
            return file.seek(0, os.SEEK_END)

    with ThreadPoolExecutor(16) as pool:
        for batch in index_batches(indices, 256):
            yield from pool.map(size, batch)


def _digests(data: ImageSet | LatentSet, indices: Sequence[int]) -> Iterator[bytes]:
    for batch in index_batches(indices, 256):
        if isinstance(data, LatentSet):
            moments, _ = data.__getitems__([(index, False) for index in batch])
            contents: Iterator[bytes] = (each.numpy().tobytes() for each in moments)
        else:
            contents = (_content(data, index) for index in batch)
        yield from (hashlib.sha256(content).digest() for content in contents)


def _content(images: ImageSet, index: int) -> bytes:
    if isinstance(images, ImageFiles):
        with images.open_file(index) as file:
            return file.read()
    return images[index][0].tobytes()


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)
