"""Hash the contents of files and folders with SHA-256."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 26  # bytes hashed by one thread


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as ``sha256sum`` prints it."""
    with Path(path).open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_hash(path: Path, known: Mapping[str, str] | None = None) -> str:
    """Return a hash of the contents of a file or folder; equal contents give equal hashes.

    Files are hashed in blocks of 64 MiB in parallel, and the digests of the blocks are hashed in
    order. The result therefore differs from ``file_sha256``.

    Args:
        path: a file, or a folder, whose file names are hashed too.
        known: SHA-256 of files that need not be read again, by their names in the folder.
    """
    known = known or {}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        if path.is_file():
            starts = range(0, max(1, path.stat().st_size), BLOCK)
            for block in pool.map(lambda start: _block_digest(path, start), starts):
                digest.update(block)
        else:
            inside = files_inside(path, os.walk(path))
            files = (name for name in inside if os.path.isfile(os.path.join(path, name)))
            names = sorted(files, key=lambda name: name.split("/"))
            read = [path / name for name in names if name not in known]
            found = pool.map(file_sha256, read)
            for name in names:
                content = known[name] if name in known else next(found)
                digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def files_inside(path: Path, folders: Iterable[tuple[str, list[str], list[str]]]) -> Iterator[str]:
    """Yield the paths, relative to ``path``, of the files that ``os.walk(path)`` has found."""
    # Use strings: with Path objects, listing and sorting take longer than reading the headers.
    prefix = len(os.path.join(path, ""))
    for folder, _, names in folders:
        for name in names:
            yield os.path.join(folder, name)[prefix:].replace(os.sep, "/")


def _block_digest(path: Path, start: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left, digest = BLOCK, hashlib.sha256()
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
