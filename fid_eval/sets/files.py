"""Read encoded images from folders, zip archives and tar archives, by index.

The objects can be pickled and forked: each process opens archives for itself.
"""

import os
import stat
import threading
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decoding import BadImage, Header, check_size, header_of, read_header, read_plain_header


class Names(Sequence[str]):
    """File names in one NumPy array: workers would copy a list of a million strings."""

    def __init__(self, names: Iterable[str] | np.ndarray) -> None:
        if not isinstance(names, np.ndarray):
            names = np.array([os.fsencode(name) for name in names], "S")
        self.array: np.ndarray = names

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int → str, else → Names
        found = self.array[index]
        return os.fsdecode(found) if isinstance(found, bytes) else Names(found)


class Files:
    """Encoded images by index. Subclasses implement ``read``.

    Attributes:
        names: name of each image.
        sizes: size of each encoded image in bytes, int64 (N,), or None; −1 if it cannot be read.
    """

    names: Any  # a sequence of str that accepts arrays of indices
    sizes: np.ndarray | None = None

    def read(self, index: int) -> bytes | Image.Image:
        """Return the encoded image, or an image of Pillow; raise BadImage or OSError."""
        raise NotImplementedError

    def header(self, index: int) -> Header:
        """Return the header of an image; raise BadImage or OSError."""
        data = self.read(index)
        return read_header(data) if isinstance(data, bytes) else header_of(data)


class FolderFiles(Files):
    """Files of a folder; ``names`` are paths relative to ``root``."""

    def __init__(self, root: Path, names: Names, sizes: np.ndarray) -> None:
        self.root, self.names, self.sizes = str(root), names, sizes

    def path(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def header(self, index: int) -> Header:
        """Read only the first and last bytes of a PNG that needs no conversion."""
        file = _open(self.path(index))
        try:
            size = os.fstat(file).st_size
            check_size(size)
            head, tail = os.pread(file, 4096, 0), os.pread(file, 1024, max(0, size - 1024))
            plain = read_plain_header(head, tail)
            return plain or read_header(head if size <= 4096 else os.pread(file, size, 0))
        finally:
            os.close(file)


def read_file(path: str | Path) -> bytes:
    """Return the content of a file; raise BadImage unless it is a regular file of at most 1 GiB."""
    file = _open(path)
    try:
        size = os.fstat(file).st_size
        check_size(size)
        return os.pread(file, size, 0)
    finally:
        os.close(file)


def _open(path: str | Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # Opening a FIFO would wait for a writer.
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise BadImage("not a regular file")
    return file


class _PerThread(threading.local):
    """A value that each thread and each process creates for itself."""

    process: int | None = None
    archive: zipfile.ZipFile


class ZipFiles(Files):
    """Members of a zip archive, by their full names."""

    def __init__(self, path: Path, names: Names, sizes: np.ndarray) -> None:
        self.path, self.names, self.sizes = path, names, sizes
        self.local = _PerThread()  # Reading moves the position of an archive.

    def __getstate__(self) -> dict:
        return {"path": self.path, "names": self.names, "sizes": self.sizes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, index: int) -> bytes:
        if self.local.process != os.getpid():
            self.local.process, self.local.archive = os.getpid(), zipfile.ZipFile(self.path)
        try:
            return self.local.archive.read(self.names[index])
        except zipfile.BadZipFile as error:
            raise BadImage(f"damaged inside the archive ({error})") from None


class TarFiles(Files):
    """Members of tar archives.

    Args:
        paths: the archives.
        names: path of each member in its archive.
        locations: number of the archive, offset and size of each member, int64 (N, 3).
    """

    def __init__(self, paths: Sequence[Path], names: Names, locations: np.ndarray) -> None:
        self.paths, self.names, self.locations = paths, names, locations
        self.sizes = locations[:, 2]

    def read(self, index: int) -> bytes:
        number, offset, size = self.locations[index].tolist()
        check_size(size)
        file = os.open(self.paths[number], os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
        finally:
            os.close(file)
        if len(data) != size:
            raise BadImage("truncated")
        return data
