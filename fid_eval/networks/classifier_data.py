"""Read, split and check the labelled images of a classifier."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from ..errors import EvaluationError
from ..progress import progress_bar
from ..sets.image_set import ImageSet

READING_BATCH = 256


class LabelledImages(NamedTuple):
    """Images with labels.

    Attributes:
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        names: file name of each image; empty if the images are not files.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str]

    def at(self, indices: Tensor) -> "LabelledImages":
        names = [self.names[i] for i in indices.tolist()] if self.names else []
        return LabelledImages(self.images[indices], self.labels[indices], names)

    def class_names(self) -> dict[int, str]:
        """Return the folder of each label, or its number if folders are not classes."""
        folders = [PurePosixPath(name).parts[0] for name in self.names]
        pairs = set(zip(self.labels.tolist(), folders, strict=True)) if folders else set()
        names = dict(pairs)
        if not pairs or len({*names.values()}) < len(pairs):
            return {label: str(label) for label in self.labels.unique().tolist()}
        return names


def read_images(source: ImageSet, workers: int) -> LabelledImages:
    """Decode all images of a set.

    Raises:
        EvaluationError: there are no images or labels, or the images do not fit into memory.
    """
    reader = source.images
    if reader is None or reader.count is None or reader.size is None:
        raise EvaluationError(f"{source.name}: holds no images to train on")
    if reader.labels is None or reader.labels.min() < 0:
        raise EvaluationError(
            f"{source.name}: has no labels ≥ 0; give one folder per class, or an .npz with arr_1"
        )
    if reader.count < 10:
        raise EvaluationError(f"{source.name}: {reader.count} images are too few; give at least 10")
    size = reader.count * reader.size[0] * reader.size[1] * 3
    if size > psutil.virtual_memory().available:
        raise EvaluationError(
            f"{source.name}: {reader.count} decoded images take {size / 2**30:.1f} GiB and do not "
            "fit into memory; give a smaller --resize, or fewer images"
        )
    images = torch.empty((reader.count, *reader.size, 3), dtype=torch.uint8)
    with progress_bar(reader.count, desc="reading", unit="img") as bar:
        for start, batch, _ in reader.batches(READING_BATCH, lambda chunk: True, workers):
            images[start : start + len(batch)] = batch.permute(0, 2, 3, 1)
            bar.update(len(batch))
    names = getattr(reader, "names", [])
    return LabelledImages(images, torch.from_numpy(reader.labels), names)


def split(
    data: LabelledImages, held_out: float | str, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Return the training images and the held-out images.

    Args:
        data: all images.
        held_out: the held-out share, or a text file with one file name or number per line.
        seed: seed of the share.

    Raises:
        EvaluationError: the list names an unknown image, no image, or all images.
    """
    count = len(data.images)
    if not isinstance(held_out, str):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        number = max(1, round(count * held_out))
        return data.at(order[number:]), data.at(order[:number])
    try:
        text = Path(held_out).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--held_out {held_out}: cannot be read as text: {error}") from None
    lines = {line.strip() for line in text.splitlines()} - {""}
    known = {name: index for index, name in enumerate(data.names)}
    known |= {str(index): index for index in range(count)}
    if unknown := lines - known.keys():
        raise EvaluationError(
            f"--held_out {held_out}: {len(unknown)} lines name no image, for example "
            f"{min(unknown)!r}; write one file name or number per line"
        )
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[[known[line] for line in lines]] = True
    if chosen.all() or not chosen.any():
        which = "all images, so none is left to train on" if chosen.any() else "no image"
        raise EvaluationError(f"--held_out {held_out}: names {which}")
    return data.at((~chosen).nonzero()[:, 0]), data.at(chosen.nonzero()[:, 0])


def match_labels(held_out: LabelledImages, data: LabelledImages, source: str) -> LabelledImages:
    """Give the classes of a separate held-out set the labels of the training images, by name.

    Raises:
        EvaluationError: the training images lack a class, or have another size.
    """
    if held_out.images.shape[1:] != data.images.shape[1:]:
        raise EvaluationError(f"--held_out {source}: its images have another size; give --resize")
    label_of = {name: label for label, name in data.class_names().items()}
    names = held_out.class_names()
    if unknown := {*names.values()} - label_of.keys():
        raise EvaluationError(
            f"--held_out {source}: has the class {min(unknown)}, which the training images lack"
        )
    labels = [label_of[names[label]] for label in held_out.labels.tolist()]
    return held_out._replace(labels=torch.tensor(labels))


def warn_of_held_out(training: LabelledImages, held_out: LabelledImages) -> None:
    """Print warnings about classes without held-out images, and about images in both sets."""
    names, present = training.class_names(), {*held_out.labels.tolist()}
    if missing := [name for label, name in sorted(names.items()) if label not in present]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(
            f"warning: no held-out images of class {', '.join(missing[:3])}{more}", file=sys.stderr
        )
    known = {*_digests(training)}
    if count := sum(digest in known for digest in _digests(held_out)):
        print(
            f"warning: {count} of {len(held_out.images)} held-out images are also training images, "
            "which raises the accuracy",
            file=sys.stderr,
        )


def _digests(data: LabelledImages) -> Iterator[bytes]:
    for image in data.images.numpy():
        yield hashlib.sha256(image.data).digest()
