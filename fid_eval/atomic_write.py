"""Write files so that a kill or a power cut leaves the previous version or a complete new one."""

import errno
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PARTIAL_PREFIX = ".partial-"  # of all temporary files and folders
HOST = re.sub(r"[^\w.-]", "_", platform.node())


@contextmanager
def atomic_path(path: Path, parents: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to ``path`` when the block succeeds.

    Args:
        path: file to create or replace.
        parents: create missing parent folders.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)  # The content must be on disk before the name.
        temporary.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # keep the error that ended the block
            remove(temporary)


def temporary_path(path: Path) -> Path:
    """Return a hidden path beside ``path`` that no other process uses.

    The temporary name keeps the suffix, from which NumPy and Matplotlib choose the format.
    """
    return path.with_name(
        f"{PARTIAL_PREFIX}{HOST}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
    )


def remove_leftovers(folder: Path, owned: bool = False) -> None:
    """Remove temporary files and folders that killed processes left in ``folder``.

    Args:
        folder: only its direct content is removed; it need not exist.
        owned: no other process may write here, so everything temporary is a leftover. Otherwise
            only temporary files of this host are removed, and only after their process has ended.
    """
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        match = re.match(rf"{re.escape(PARTIAL_PREFIX + HOST)}-(\d+)-[0-9a-f]{{8}}-", path.name)
        if owned or (match and not psutil.pid_exists(int(match[1]))):
            with suppress(OSError):  # another process may be removing it, too
                remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder that may not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with the names in it, is on disk."""
    if os.name != "posix":  # Windows opens no folders.
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or path.is_file():
            raise
    finally:
        os.close(opened)
