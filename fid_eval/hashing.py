"""Content hashes of files and folders."""

import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 26


def file_sha256(path: str | Path) -> str:
    """The usual sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def path_hash(path: Path) -> str:
    """sha256 over a file's blocks, or a folder's names and files: equal content, equal hash.

    Blocks of 64 MiB are hashed in parallel and their digests hashed in order, so this is not the
    file's plain sha256.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        if path.is_file():
            starts = range(0, max(1, path.stat().st_size), BLOCK)
            for block in pool.map(lambda start: _block_digest(path, start), starts):
                digest.update(block)
        else:
            files = sorted(p for p in path.rglob("*") if p.is_file())
            for file, content in zip(files, pool.map(file_sha256, files), strict=True):
                digest.update(f"{file.relative_to(path).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def path_hash_aside(path: Path) -> str:
    """``path_hash`` that leaves the interpreter to others; for a thread to wait for.

    The blocks of a file are hashed without the interpreter lock, but the thousands of files of a
    folder ask for it all the time, and the thread that launches kernels asks as often: a process.
    """
    if path.is_file() or "fork" not in multiprocessing.get_all_start_methods():
        return path_hash(path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(path_hash, path).result()


def _block_digest(path: Path, start: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left, digest = BLOCK, hashlib.sha256()
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
