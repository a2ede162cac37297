"""Read one array per image from sharded ``.npy`` files, and check every record that is read."""

import hashlib
import math
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError


class StoredArray:
    """One array per image and per mirror image, read through memory maps of bounded resident size.

    A record is the array of one image. A file contains the records of consecutive images,
    (1 or 2, n, *shape); the second row belongs to the mirror images.

    Args:
        folder: folder of the files.
        name: name of the array in the index.
        index: index in the structure of format 2.

    Raises:
        UserError: the file of checksums does not match the index.
    """

    RESIDENT_BYTES = 256 * 2**20  # bytes to read before mapped pages are released

    def __init__(self, folder: Path, name: str, index: dict[str, Any]):
        self.folder, array = folder, index["arrays"][name]
        self.dtype = np.dtype(array["dtype"])
        self.views: int = 1 + index["flipped"]
        self.files = [shard["arrays"][name] for shard in index["shards"]]
        self.shapes = [tuple(file.get("shape", array["shape"])) for file in self.files]
        counts = [shard["num_images"] for shard in index["shards"]]
        self._starts = np.cumsum([0, *counts])  # first image of each shard
        self._crc32_file: dict[str, str] | None = array.get("crc32")
        self._checksums: np.ndarray | None = None
        if self._crc32_file is not None:
            path = folder / self._crc32_file["file"]
            self._checksums = load_array(path, (self.views, int(self._starts[-1])), np.uint32)
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._bytes_read = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory maps, which cannot be pickled; a spawned worker creates its own."""
        return {**self.__dict__, "_maps": {}, "_bytes_read": 0}

    def read(self, items: Sequence[tuple[int, bool]]) -> np.ndarray:
        """Read a batch of records of one shape, ``(image, flip)`` each.

        Returns:
            The records in their stored dtype, (B, *shape).

        Raises:
            UserError: a record is damaged; the message names folder, shard and record.
        """
        places = [(*self._locate(image), int(flip)) for image, flip in items]
        records = [self._shard(number)[1][flip, position] for number, position, flip in places]
        for place in places:
            self._prefetch(*place)
        batch = np.stack(records)
        # A page fault also maps cached neighbours: up to 64 KiB at both ends of a record.
        self._release_pages(sum(record.nbytes + 2 * 65536 for record in records))
        if self._checksums is not None:
            images, flips = np.array(items, np.int64).T
            expected = self._checksums[flips, images].tolist()
            for item, record, checksum in zip(items, batch, expected, strict=True):
                if zlib.crc32(record) != checksum:
                    self._raise_damaged(*item)
        return batch

    def verify(self) -> None:
        """Read all files and compare them with the hashes in the index.

        Raises:
            UserError: a file or a record has changed; the message names the first one.
        """
        if self._crc32_file is not None:
            path = self.folder / self._crc32_file["file"]
            if hashlib.sha256(path.read_bytes()).hexdigest() != self._crc32_file["sha256"]:
                raise UserError(f"latents {path} are damaged: {ADVICE}")
        for number, file in enumerate(self.files):
            data, records = self._shard(number)
            if hashlib.sha256(data).hexdigest() != file["sha256"]:
                if self._checksums is not None:
                    self._raise_first_damaged(number, records)
                raise UserError(f"latents {self.folder / file['file']} are damaged: {ADVICE}")
            self._release_pages(len(data))

    def _raise_first_damaged(self, number: int, records: np.ndarray) -> None:
        assert self._checksums is not None
        start = int(self._starts[number])
        for flip, position in np.ndindex(*records.shape[:2]):
            if zlib.crc32(records[flip, position].data) != self._checksums[flip, start + position]:
                self._raise_damaged(start + position, bool(flip))

    def _raise_damaged(self, image: int, flip: bool) -> None:
        number, position = self._locate(image)
        mirrored = ", mirrored" if flip else ""
        raise UserError(
            f"latents {self.folder / self.files[number]['file']} are damaged: record {position} "
            f"(image {image}{mirrored}) has another checksum than when it was written; {ADVICE}"
        )

    def _locate(self, image: int) -> tuple[int, int]:
        """Return the shard that contains an image, and the image's position in it."""
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)}")
        number = int(self._starts.searchsorted(image, "right")) - 1
        return number, image - int(self._starts[number])

    def _shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        """Return the memory map of a shard, and its records (1 or 2, n, *shape)."""
        if number not in self._maps:
            count = int(self._starts[number + 1] - self._starts[number])
            shape = (self.views, count, *self.shapes[number])
            path = self.folder / self.files[number]["file"]
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                start = file.tell()
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(data) != start + math.prod(shape) * self.dtype.itemsize:
                raise UserError(f"latents {path} are incomplete: the file has {len(data)} bytes")
            _advise(data, "MADV_RANDOM")  # keep the kernel from reading ahead
            self._maps[number] = data, np.frombuffer(data, self.dtype, offset=start).reshape(shape)
        return self._maps[number]

    def _prefetch(self, number: int, position: int, flip: int) -> None:
        """Start reading a record, so that a batch loads in parallel."""
        data, records = self._shard(number)
        size = records[0, 0].nbytes
        header = len(data) - records.nbytes
        start = header + (flip * records.shape[1] + position) * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(data, "MADV_WILLNEED", page, start + size - page)

    def _release_pages(self, num_bytes: int) -> None:
        """Count the bytes read, and release mapped pages before too many of them are resident."""
        self._bytes_read += num_bytes
        if self._bytes_read >= self.RESIDENT_BYTES:
            for data, _ in self._maps.values():
                _advise(data, "MADV_DONTNEED")
            self._bytes_read = 0


ADVICE = "restore the file from a copy, or encode the images again"


def load_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Map an ``.npy`` file that must have this shape and dtype.

    Raises:
        UserError: the file is damaged, or has another shape or dtype.
    """
    try:
        array = np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError, EOFError):
        raise UserError(f"latents {path} are damaged: {ADVICE}") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"latents {path} do not match the index: {ADVICE}")
    return array


def _advise(data: mmap.mmap, name: str, *where: int) -> None:
    """Call ``madvise`` if the platform has this advice. It affects only speed and memory."""
    if (advice := getattr(mmap, name, None)) is not None:
        data.madvise(advice, *where)
