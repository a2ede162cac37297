"""Read the arrays inside an .npz row by row, without loading a whole array.

An .npz is a zip archive of .npy files. Rows of an uncompressed array are read from their offset in
the file. A compressed array is decompressed from its start onwards.
"""

import math
import struct
import threading
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from ..errors import EvaluationError, describe_error

LARGE = 1 << 28  # bytes; larger reads are compared with the free memory
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
        except EvaluationError:
            raise
        except zipfile.BadZipFile:
            raise EvaluationError(
                f"{path}: not a complete .npz (no zip directory at its end); it is truncated "
                "or still being written: copy or write it again"
            ) from None


class NpzMember:
    """One array of an .npz: its shape and dtype, and its rows on request."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.path, self.name = path, info.filename
        if info.flag_bits & 1:
            raise EvaluationError(f"{path}: {self.name} is encrypted; decrypt the archive first")
        try:
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                self.shape, fortran, self.dtype = header(member)
                self.header_size = member.tell()
        except Exception as error:  # zipfile, zlib and NumPy raise many types
            raise self._damaged(error) from error
        if min(self.shape, default=0) < 0:
            raise EvaluationError(f"{path}: {self.name} has the impossible shape {self.shape}")
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file, which another process opens for itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_stream", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _stream=None, _lock=threading.Lock())

    def _damaged(self, error: Exception) -> EvaluationError:
        return EvaluationError(f"{self.path}: {self.name} cannot be read: {describe_error(error)}")

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows ``start`` to ``stop``. A compressed array is fast only in file order."""
        if not self.shape:
            start, stop = 0, 1
        elif stop is None:
            stop = self.shape[0]
        size = (stop - start) * self.row_size
        if size > LARGE and size > psutil.virtual_memory().available:
            raise EvaluationError(
                f"{self.path}: {self.name} is {self.shape} {self.dtype}; {size >> 30} GiB of it do "
                "not fit into memory"
            )
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
            try:
                if self._stream is None:
                    with zipfile.ZipFile(self.path) as archive:
                        self._stream = archive.open(self.name)  # keeps the file open
                # Seeking forwards decompresses what lies between, and backwards from the start.
                self._stream.seek(self.header_size + start * self.row_size)
                while rest:
                    block = self._stream.read(min(len(rest), 1 << 24))
                    if not block:
                        raise EOFError("unexpected end")
                    rest[: len(block)] = block
                    rest = rest[len(block) :]
            except Exception as error:
                raise self._damaged(error) from error
