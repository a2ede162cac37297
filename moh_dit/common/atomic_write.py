"""Atomic writes of files and folders: a kill leaves the old content or the new, never a part."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

PARTIAL_SUFFIX = ".partial"  # of the temporary file


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically. A kill may leave the temporary file ``.NAME.PID.partial``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Without it, a power loss could leave an empty file.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_output(output: Path, advice: str = "") -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to ``output`` at the end.

    A failure inside the block leaves neither the temporary path nor new parent folders.

    Args:
        output: file or folder to write; must not exist.
        advice: end of the error message.

    Raises:
        UserError: no space or no permission to write.
    """
    temporary = output.with_name(f".writing-{output.name}")
    made = next((p for p in [*output.absolute().parents][::-1] if not p.exists()), None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # left by a killed process
        yield temporary
        for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} could not be written ({error}){advice}") from None
    finally:
        remove(temporary)
        if made is not None and not output.exists():
            remove(made)


def remove(path: Path) -> None:
    """Delete a file or folder that may not exist."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
