"""Checksums of the files in a folder, written last and verified when the files are loaded.

    FOLDER/manifest.json
      {"version": 1, "files": {"state/model.safetensors": {"bytes": 20000000,
                                                           "crc32": ["0a1b2c3d", "4e5f6071"]}}}

There is one CRC-32 for each 16 MiB of a file, so threads compute and verify them in parallel. The
checksums detect accidental damage. They do not protect against deliberate changes.
"""

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
CHUNK_BYTES = 16 << 20
READ_BYTES = 256 << 10  # fits the cache of a core
THREADS = 4

FileEntry = dict[str, Any]  # "bytes" and "crc32"


def write_manifest(folder: Path) -> None:
    """Write or replace the manifest of ``folder``, with the checksums of all its files."""
    names = sorted(_files(folder) - {MANIFEST})
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = [(folder / name).stat().st_size for name in names]
        sums = [
            _start_checksums(pool, folder / name, size)
            for name, size in zip(names, sizes, strict=True)
        ]
        files = {
            name: {"bytes": size, "crc32": [each.result() for each in chunks]}
            for name, size, chunks in zip(names, sizes, sums, strict=True)
        }
    content = {"version": VERSION, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, separators=(",", ":")) + "\n")


def find_damage(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """Describe the first file that differs from the manifest of ``folder``.

    Args:
        folder: a folder with a manifest.
        names: paths relative to ``folder``, with slashes; by default all files in the manifest.

    Returns:
        ``None`` if all files match the manifest.
    """
    manifest = folder / MANIFEST
    try:
        files: dict[str, FileEntry] = json.loads(manifest.read_bytes())["files"]
        expected = {name: (int(entry["bytes"]), entry["crc32"]) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{manifest} is damaged ({error})"
    with ThreadPoolExecutor(THREADS) as pool:
        for name in expected if names is None else names:
            file = folder / name
            if name not in expected:
                return f"{file} is not listed in {manifest}; it was renamed or added later"
            size, sums = expected[name]
            try:
                if (found := file.stat().st_size) != size:
                    return f"{file} is damaged: it has {found} bytes instead of {size}"
                present = [each.result() for each in _start_checksums(pool, file, size)]
            except OSError as error:
                return f"{file} is damaged ({error})"
            if present != sums:
                return f"{file} is damaged: its checksum differs from {MANIFEST}"
    return None


def verify_files(*files: Path) -> None:
    """Compare files with the manifest of their folder or of a folder above.

    Files without a manifest, such as those of other projects, are not verified.

    Raises:
        UserError: a file differs from its manifest, or is not listed in it.
    """
    for file in files:
        # A file of a checkpoint or pipeline lies in the folder of the manifest or one level deeper.
        for folder in file.absolute().parents[:2]:
            if (folder / MANIFEST).is_file():
                _verify(folder, [file.absolute().relative_to(folder).as_posix()])
                break


def verify_folder(folder: Path) -> None:
    """Compare all files of ``folder`` with its manifest, if it has one.

    Raises:
        UserError: a file is missing or differs from the manifest.
    """
    if (folder / MANIFEST).is_file():
        _verify(folder, None)


def _verify(folder: Path, names: Iterable[str] | None) -> None:
    if damage := find_damage(folder, names):
        raise UserError(
            f"{damage}. Restore the file; if you changed it yourself, remove "
            f"{folder / MANIFEST} or give --no_verify"
        )


def _files(folder: Path) -> set[str]:
    paths = folder.rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def _start_checksums(pool: ThreadPoolExecutor, file: Path, size: int) -> list[Future[str]]:
    return [pool.submit(_crc32, file, start) for start in range(0, size, CHUNK_BYTES)]


def _crc32(file: Path, start: int) -> str:
    buffer = memoryview(bytearray(READ_BYTES))
    checksum, left = 0, CHUNK_BYTES
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while count := opened.readinto(buffer[:left]):
            checksum = zlib.crc32(buffer[:count], checksum)
            left -= count
    return f"{checksum:08x}"
