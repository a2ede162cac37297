"""Hugging Face data sets as they arrive: encoded without being stored first.

A stream is made of files, each read from its start. A part is so many consecutive rows of one file
and becomes one shard; a process works on every n-th file. So what a shard holds depends on the data
alone, and after a kill whole files are passed over, and rows within a file.

    moments-FILE-PART.npy     a finished part
    file-FILE.done            all parts of this file are finished
"""

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..common.errors import UserError
from .hugging_face import STREAM_PREFIX, choose_columns, datasets_library, open_hub
from .latent_shards import SHARD_PREFIX, write_file
from .pixels import read_pixels

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 (B, S, S, 3) and int64 (B,)
Item = TypeVar("Item")


class _Row(NamedTuple):
    name: str  # for messages
    image: dict[str, Any]  # its bytes, or the path or URL of a file
    label: int | None


class HubStream:
    """A Hugging Face data set read in order: ``hf-stream:NAME[/CONFIG][@SPLIT]``.

    Columns and labels are chosen as for ``HubImages``. ``num_images`` is what the data set says of
    itself, ``None`` where it says nothing.
    """

    def __init__(self, source: str, image_size: int, *, skip_unreadable: bool = False):
        self.source, self.image_size, self.skip_unreadable = source, image_size, skip_unreadable
        name = source.removeprefix(STREAM_PREFIX)
        self._data, self._origin = open_hub(name, source, streaming=True)
        self._image, self._label = choose_columns(self._data, source)
        self.class_names = list(self._data.features[self._label].names)
        self.num_files: int = self._data.num_shards
        split = (self._data.info.splits or {}).get(str(self._data.split))
        self.num_images: int | None = split.num_examples if split else None
        self._data = self._data.select_columns([self._image, self._label]).cast_column(
            self._image, datasets_library(source).Image(decode=False)
        )

    def fingerprint(self) -> str:
        """Over the classes, and the names and versions of the files: their content is unseen."""
        return hashlib.sha256(json.dumps([self.class_names, self._origin]).encode()).hexdigest()

    def parts(
        self, folder: Path, rows_per_part: int, batch_size: int, threads: int, rank: int, size: int
    ) -> Iterator[tuple[str, Iterator[Labelled]]]:
        """Name and images of each part that process ``rank`` of ``size`` has still to encode.

        The images of a part must be used up before the next part is asked for.

        Raises:
            UserError: an image that cannot be read, unless skipped; a missing label; a connection
                that broke.
        """
        for number in range(rank, self.num_files, size):
            done = folder / _done(number)
            if done.exists():
                continue
            first_part = len(self._present(folder, number))
            rows = self._rows(number, first_part * rows_per_part)
            for part in itertools.count(first_part):
                if (first := next(rows, None)) is None:
                    break
                of_part = itertools.chain([first], itertools.islice(rows, rows_per_part - 1))
                name = f"{SHARD_PREFIX}{number:05}-{part:05}.npy"
                yield name, _read_ahead(self._batches(of_part, batch_size, threads))
            write_file(done, b"")

    def finish(self, folder: Path) -> list[str]:
        """The names of all parts in order, once every file is done."""
        return [path.name for n in range(self.num_files) for path in self._present(folder, n)]

    def _present(self, folder: Path, number: int) -> list[Path]:
        return sorted(folder.glob(f"{SHARD_PREFIX}{number:05}-*.npy"))

    def _rows(self, number: int, start: int) -> Iterator[_Row]:
        """The rows of a file from ``start`` on, images as they are stored."""
        try:
            for index, row in enumerate(self._data.shard(self.num_files, number).skip(start)):
                name = f"{start + index} of file {number} of {self.source}"
                yield _Row(name, row[self._image], row[self._label])
        except Exception as error:  # of whichever library was fetching or parsing
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"data {self.source} broke off ({reason}); what is finished stays: give the "
                "command again with --resume"
            ) from None

    def _batches(self, rows: Iterator[_Row], batch_size: int, threads: int) -> Iterator[Labelled]:
        """Batches of the images that can be read; only the last one may be short."""
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        with ThreadPoolExecutor(threads) as pool:
            while some := list(itertools.islice(rows, batch_size - len(pixels))):
                for row, image in zip(some, pool.map(self._pixels, some), strict=True):
                    if isinstance(image, str) and not self.skip_unreadable:
                        raise UserError(
                            f"image {row.name} cannot be read ({image}): mend or remove it, or set "
                            "skip_unreadable to leave such images out"
                        )
                    if isinstance(image, str):
                        print(f"skipped image {row.name}: {image}", file=sys.stderr)
                        continue
                    if row.label is None or not 0 <= row.label < len(self.class_names):
                        raise UserError(f"image {row.name} has no label, as in many test splits")
                    pixels.append(image)
                    labels.append(row.label)
                if len(pixels) == batch_size:
                    yield np.stack(pixels), np.array(labels, np.int64)
                    pixels, labels = [], []
        if pixels:
            yield np.stack(pixels), np.array(labels, np.int64)

    def _pixels(self, row: _Row) -> np.ndarray | str:
        """A row's image, uint8 (S, S, 3), or why it cannot be read."""
        try:
            content = row.image["bytes"]
            if content is None:
                import fsspec  # comes with datasets; opens paths and URLs alike

                with fsspec.open(row.image["path"], "rb") as file:
                    content = file.read()
            return read_pixels(io.BytesIO(content), self.image_size)
        except (OSError, ValueError) as error:
            return str(error)


def _done(number: int) -> str:
    return f"file-{number:05}.done"


def _read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made while the one before is being used."""
    following: Callable[[], Item | None] = lambda: next(items, None)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(following)
        while (item := future.result()) is not None:
            future = pool.submit(following)
            yield item
