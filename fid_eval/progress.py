"""Show progress: a bar on a terminal, a line every few seconds in a log file."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15


class _Lines:
    """Text stream that prints each state of a tqdm bar as a line of its own."""

    def write(self, text: str) -> None:
        # tqdm writes codes that move the cursor up, which a log file cannot do.
        if line := text.replace("\x1b[A", "").strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    total: int | None,
    *,
    desc: str,
    unit: str,
    enabled: bool = True,
    initial: int = 0,
    delay: float = 0,
) -> tqdm:
    """Return a tqdm bar that shows the rate and the time left.

    Args:
        total: number of units, ``None`` if unknown.
        desc: what the program is doing, as shown before the numbers.
        unit: name of one unit.
        enabled: show nothing if false.
        initial: units already done.
        delay: in a log file, seconds without output at the start.
    """
    options: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        options = {
            "file": _Lines(),
            "mininterval": SECONDS_BETWEEN_LINES,
            "maxinterval": SECONDS_BETWEEN_LINES,
            "delay": delay,
            "bar_format": "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
        }
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not enabled, **options)
