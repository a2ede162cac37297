"""Files and folders that a kill leaves as they were or as they shall be."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError

PARTIAL_SUFFIX = ".partial"  # of a file until it is whole


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; a kill may leave ``.{name}.{process}.partial`` beside."""
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave a name and no content
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_output(output: Path, advice: str = "") -> Iterator[Path]:
    """A path for a file or folder, renamed to ``output`` when whole; a failure leaves nothing.

    Raises:
        UserError: it cannot be written, for want of space or rights; ends with ``advice``.
    """
    aside = output.with_name(f".writing-{output.name}")
    made = next((p for p in [*output.absolute().parents][::-1] if not p.exists()), None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)  # of a process that was killed
        yield aside
        for file in filter(Path.is_file, [aside, *aside.rglob("*")]):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        aside.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} could not be written ({error}){advice}") from None
    finally:
        remove(aside)
        if made is not None and not output.exists():
            remove(made)


def remove(path: Path) -> None:
    """Delete a file or folder that may not exist."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
