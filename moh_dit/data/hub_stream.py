"""Read Hugging Face data sets as a stream, so that they are encoded without being stored.

A stream consists of files, each read from its start. A part is a fixed number of consecutive rows
of one file and becomes one shard. A process reads every n-th file. The contents of a shard thus
depend only on the data, and a resumed encoding skips finished files and finished rows of a file.

    moments-FILE-PART.npy     a finished part
    file-FILE.done            marks a file whose parts are all finished
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fid_eval.sets.decoding import Preprocess, decode
from fid_eval.sets.hugging_face import (
    choose_columns,
    encoded_image,
    keep_encoded,
    load_split,
    parse_hub_url,
)

from ..common.errors import UserError
from .image_sources import user_errors
from .latent_shards import SHARD_PREFIX

Batch = tuple[np.ndarray, np.ndarray]  # uint8 (B, S, S, 3) and int64 (B,)
Item = TypeVar("Item")


class _Row(NamedTuple):
    name: str  # for messages
    image: dict[str, Any]  # encoded image: "bytes", or "path", a path or URL
    label: int | None


class HubStream:
    """A Hugging Face data set read in order: ``hf://OWNER/NAME[/CONFIG]?streaming=true``.

    Columns are chosen as for a stored data set. Labels must be of type ``ClassLabel``.

    Attributes:
        num_images: number of images according to the data set's metadata, or ``None``.
    """

    def __init__(self, source: str, image_size: int, *, skip_unreadable: bool = False):
        self.source, self.image_size, self.skip_unreadable = source, image_size, skip_unreadable
        self._preprocess = Preprocess(image_size, crop=True)
        self.conversions: Counter[str] = Counter()
        with user_errors("data "):
            url = parse_hub_url(source)
            self._data, self._versions = load_split(source, streaming=True)
            self._image, label, _ = choose_columns(self._data, source, url.image, url.label)
        names = getattr(self._data.features.get(label), "names", None)
        if label is None or names is None:
            raise UserError(
                f"data {source} is a stream without a column of type ClassLabel, so its classes "
                "are unknown: remove streaming=true"
            )
        self._label, self.class_names = label, list(names)
        self.num_files: int = self._data.num_shards
        split = (self._data.info.splits or {}).get(str(self._data.split))
        self.num_images: int | None = split.num_examples if split else None
        self._data = keep_encoded(self._data, self._image)
        self._data = self._data.select_columns([self._image, self._label])

    def fingerprint(self) -> str:
        """Return a SHA-256 over the class names, and the names and versions of all files.

        The files have not been read yet, so their contents are not included.
        """
        return hashlib.sha256(json.dumps([self.class_names, self._versions]).encode()).hexdigest()

    def parts(
        self, folder: Path, rows_per_part: int, batch_size: int, threads: int, files: slice
    ) -> Iterator[tuple[str, Iterator[Batch]]]:
        """Yield file name and batches of each part of these files that must still be encoded.

        All batches of a part must be read before the next part is requested. After the last part of
        a file comes the name of its marker without batches. Write it empty, after the parts.

        Raises:
            UserError: an unreadable image (unless skipped), a missing label, or a lost connection.
        """
        for number in range(self.num_files)[files]:
            done = folder / f"file-{number:05}.done"
            if done.exists():
                continue
            first_part = len(self._finished_parts(folder, number))
            rows = self._rows(number, first_part * rows_per_part)
            for part in itertools.count(first_part):
                if (first := next(rows, None)) is None:
                    break
                part_rows = itertools.chain([first], itertools.islice(rows, rows_per_part - 1))
                name = f"{SHARD_PREFIX}{number:05}-{part:05}.npy"
                yield name, _read_ahead(self._batches(part_rows, batch_size, threads))
            yield done.name, iter(())  # written after the parts of the file

    def finish(self, folder: Path) -> list[str]:
        """Return the file names of all parts in order. All files must be finished."""
        numbers = range(self.num_files)
        return [path.name for n in numbers for path in self._finished_parts(folder, n)]

    def _finished_parts(self, folder: Path, number: int) -> list[Path]:
        return sorted(folder.glob(f"{SHARD_PREFIX}{number:05}-*.npy"))

    def _rows(self, number: int, start: int) -> Iterator[_Row]:
        """Yield the rows of a file from row ``start`` on, with encoded images."""
        try:
            for index, row in enumerate(self._data.shard(self.num_files, number).skip(start)):
                name = f"{start + index} of file {number} of {self.source}"
                yield _Row(name, row[self._image], row[self._label])
        except Exception as error:  # raised by any of the libraries that download and parse
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"reading data {self.source} failed ({reason}): finished shards are kept; run the "
                "command again with --resume"
            ) from None

    def _batches(self, rows: Iterator[_Row], batch_size: int, threads: int) -> Iterator[Batch]:
        """Yield batches of readable images. Only the last batch may be smaller."""
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        with ThreadPoolExecutor(threads) as pool:
            while chunk := list(itertools.islice(rows, batch_size - len(pixels))):
                for row, image in zip(chunk, pool.map(self._pixels, chunk), strict=True):
                    if isinstance(image, str) and not self.skip_unreadable:
                        raise UserError(
                            f"image {row.name} cannot be read ({image}): repair or remove it, or "
                            "set skip_unreadable to skip such images"
                        )
                    if isinstance(image, str):
                        print(f"skipped image {row.name}: {image}", file=sys.stderr)
                        continue
                    if row.label is None or not 0 <= row.label < len(self.class_names):
                        raise UserError(
                            f"image {row.name} has no label, as in many test splits: choose "
                            "another split"
                        )
                    pixels.append(image)
                    labels.append(row.label)
                if len(pixels) == batch_size:
                    yield np.stack(pixels), np.array(labels, np.int64)
                    pixels, labels = [], []
        if pixels:
            yield np.stack(pixels), np.array(labels, np.int64)

    def _pixels(self, row: _Row) -> np.ndarray | str:
        """Return the image of a row, uint8 (S, S, 3), or the reason why it cannot be read."""
        try:
            pixels, conversions = decode(encoded_image(row.image), self._preprocess)
        except (OSError, ValueError) as error:
            return str(error)
        self.conversions.update(conversions)
        return pixels


def _read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items, and compute the next one in a thread in the meantime."""
    following: Callable[[], Item | None] = lambda: next(items, None)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(following)
        while (item := future.result()) is not None:
            future = pool.submit(following)
            yield item
