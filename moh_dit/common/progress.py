"""Progress of long work: a bar on a terminal, a plain line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15


class _Lines:
    """A text stream that turns tqdm's redrawn bar into lines."""

    def write(self, text: str) -> None:
        # tqdm moves the cursor between bars; a log file has none.
        if line := text.replace("\x1b[A", "").strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    total: int | None, *, desc: str, unit: str, enabled: bool = True, initial: int = 0
) -> tqdm:
    """A tqdm bar with rate and remaining time."""
    options: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        options = {
            "file": _Lines(),
            "mininterval": SECONDS_BETWEEN_LINES,
            "maxinterval": SECONDS_BETWEEN_LINES,
            "bar_format": "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        }
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not enabled, **options)
