"""Check the free disk space before a program writes large files."""

import math
import shutil
from pathlib import Path

from .errors import UserError

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def require_disk_space(path: Path, needed: float, purpose: str) -> None:
    """Raise ``UserError`` if the disk of ``path`` has fewer than ``needed`` bytes free.

    Args:
        path: file or folder to be written; it need not exist yet.
        needed: number of bytes.
        purpose: what needs the space, as the subject of the message ("the next checkpoint").
    """
    absolute = path.absolute()
    folder = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{purpose} needs {format_bytes(needed)} of disk space, but only {format_bytes(free)} "
            f"are free at {folder}: free some space or write to another disk"
        )


def format_bytes(count: float) -> str:
    """Return a number of bytes as text in the largest fitting unit, for example ``1.5 GiB``."""
    power = min(int(math.log(max(count, 1), 1024)), len(UNITS) - 1)
    return f"{count / 1024**power:.4g} {UNITS[power]}"
