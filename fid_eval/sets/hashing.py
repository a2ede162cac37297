"""Content hashes of files and folders."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 26


def file_sha256(path: str | Path) -> str:
    """The usual sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def path_hash(path: Path, known: Mapping[str, str] | None = None) -> str:
    """sha256 over a file's blocks, or a folder's names and files: equal content, equal hash.

    Blocks of 64 MiB are hashed in parallel and their digests hashed in order, so this is not the
    file's plain sha256. ``known``: sha256 of files of the folder, by their names in it, that need
    not be read again.
    """
    known = known or {}
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        if path.is_file():
            starts = range(0, max(1, path.stat().st_size), BLOCK)
            for block in pool.map(lambda start: _block_digest(path, start), starts):
                digest.update(block)
        else:
            names = sorted(_files(path), key=lambda name: name.split("/"))
            read = [path / name for name in names if name not in known]
            found = pool.map(file_sha256, read)
            for name in names:
                content = known[name] if name in known else next(found)
                digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[str]:
    """Names in a folder of all files under it, with slashes; no folder behind a link."""
    for folder, _, names in os.walk(path):
        inside = Path(os.path.relpath(folder, path)).as_posix()
        for name in names:
            if os.path.isfile(os.path.join(folder, name)):
                yield name if inside == "." else f"{inside}/{name}"


def _block_digest(path: Path, start: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left, digest = BLOCK, hashlib.sha256()
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
