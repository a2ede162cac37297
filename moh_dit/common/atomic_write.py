"""Atomic writes of files and folders: a kill leaves the old content or the new, never a part."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fid_eval.atomic_write import atomic_path, remove, remove_leftovers, sync, temporary_path

from .errors import UserError
from .manifest import MANIFEST, write_manifest


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically. The folder of the file must exist."""
    with atomic_path(path, parents=False) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_output(output: Path, advice: str = "", *, manifest: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to ``output`` at the end.

    A failure inside the block leaves neither the temporary path nor new parent folders.

    Args:
        output: file or folder to write; must not exist.
        advice: end of the error message.
        manifest: add the checksums of all files to the folder.

    Raises:
        UserError: ``output`` exists at the end, or there is no space or no permission to write.
    """
    temporary = temporary_path(output)
    made = next((p for p in [*output.absolute().parents][::-1] if not p.exists()), None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent)
        yield temporary
        with ThreadPoolExecutor(1) as pool:  # compute the checksums while the disk writes
            synced = pool.submit(sync_tree, temporary)
            if manifest:
                write_manifest(temporary)
            synced.result()
        if manifest:
            sync(temporary / MANIFEST)
            sync(temporary)
        publish(temporary, output)
        sync(output.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} could not be written ({error}){advice}") from None
    finally:
        with suppress(OSError):  # keep the error that ended the block
            remove(temporary)
            if made is not None and not output.exists():
                remove(made)


def sync_tree(path: Path) -> None:
    """Wait until a file, or a folder with its whole content, is on disk."""
    for each in [*path.rglob("*"), path]:
        sync(each)


def publish(temporary: Path, output: Path) -> None:
    """Rename a file or folder to ``output``, and overwrite nothing.

    Raises:
        FileExistsError: another process has created ``output``.
        OSError: the rename failed.
    """
    exists = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(output))
    if temporary.is_file():
        with suppress(OSError):  # a file system without hard links
            os.link(temporary, output)  # unlike a rename, fails if the file exists
            temporary.unlink()
            return
    if output.exists():
        raise exists
    try:
        temporary.rename(output)
    except OSError:
        if output.is_dir():  # created after the check above
            raise exists from None
        raise
