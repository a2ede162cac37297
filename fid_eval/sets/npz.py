"""Read the arrays inside an .npz row by row, without loading a whole array.

An .npz is a zip archive of .npy files. Rows of an uncompressed array are read from their offset in
the file. A compressed array is decompressed from its start onwards.
"""

import math
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import EvaluationError

LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and extra field of a zip entry


class NpzFile(dict[str, "NpzMember"]):
    """The arrays of an .npz by name. Opening reads names, shapes and dtypes only."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self[info.filename[:-4]] = NpzMember(path, archive, info)
        except zipfile.BadZipFile:
            raise EvaluationError(
                f"{path}: not a complete .npz (no zip directory at its end); it is truncated "
                "or still being written: copy or write it again"
            ) from None


class NpzMember:
    """One array of an .npz: its shape and dtype, and its rows on request."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.path, self.name = path, info.filename
        with archive.open(info) as member:
            try:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                self.shape, fortran, self.dtype = header(member)
            except (ValueError, EOFError, zipfile.BadZipFile) as error:
                raise EvaluationError(f"{path}: member {self.name} is damaged: {error}") from None
            self.header_size = member.tell()
        if fortran and len(self.shape) > 1:
            raise EvaluationError(
                f"{path}: {self.name} is in Fortran order, which cannot be read by rows; save "
                "np.ascontiguousarray(array) instead"
            )
        if self.dtype.hasobject:
            raise EvaluationError(
                f"{path}: {self.name} holds pickled Python objects, which are not loaded"
            )
        size = self.header_size + math.prod(self.shape) * self.dtype.itemsize
        if size != info.file_size:
            raise EvaluationError(
                f"{path}: {self.name} is {self.shape} {self.dtype} = {size} bytes, but only "
                f"{info.file_size} are stored (truncated); write it again"
            )
        self.row_size = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.compressed = info.compress_type != zipfile.ZIP_STORED
        if not self.compressed:
            with path.open("rb") as file:
                file.seek(info.header_offset)
                name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            self.offset = info.header_offset + 30 + name_length + extra_length + self.header_size
        self._stream: IO[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows ``start`` to ``stop``. A compressed array is fast only in file order."""
        if not self.shape:
            start, stop = 0, 1
        elif stop is None:
            stop = self.shape[0]
        array = np.empty(((stop - start), *self.shape[1:]), self.dtype)
        if self.compressed:
            self._read_compressed(start, array)
        else:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.row_size)
                if array.nbytes and file.readinto(array.data.cast("B")) != array.nbytes:
                    raise EvaluationError(f"{self.path}: {self.name} ends early (truncated)")
        return array if self.shape else array[0]

    def _read_compressed(self, start: int, array: np.ndarray) -> None:
        rest = array.data.cast("B") if array.nbytes else memoryview(b"")
        with self._lock:
            if self._stream is None:
                with zipfile.ZipFile(self.path) as archive:  # An open member keeps the file open.
                    self._stream = archive.open(self.name)
            try:
                # Seeking forwards decompresses what lies between, and backwards from the start.
                self._stream.seek(self.header_size + start * self.row_size)
                while rest:
                    block = self._stream.read(min(len(rest), 1 << 24))
                    if not block:
                        raise EOFError("unexpected end")
                    rest[: len(block)] = block
                    rest = rest[len(block) :]
            except (EOFError, zipfile.BadZipFile, OSError, zlib.error) as error:
                raise EvaluationError(f"{self.path}: {self.name} is damaged: {error}") from None
