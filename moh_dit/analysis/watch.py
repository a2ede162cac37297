"""Follow a run from a terminal (`moh-dit watch RUN`)."""

import json
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ..training.progress import ENDED, STATUS_FILE, TRAINING
from ..training.run_log import LOG_FILE, progress_postfix, read_log
from .config import WatchConfig

QUIET_SECONDS = 120  # without a new entry or activity, the line says how old the last one is


def watch(config: WatchConfig) -> None:
    """Print the state of a run until it ends: one line that is renewed, or a line per change.

    Without ``status.json`` it is unknown whether the run continues, so one line is printed.
    """
    config.check_paths()
    run, live, printed = Path(config.run), sys.stdout.isatty(), ""
    while True:
        log, status = read_log(run / LOG_FILE), read_status(run)
        text = describe(log, status, time.time() if live or config.once else None)
        if not status:
            print(f"{text} ({run / STATUS_FILE} is missing or damaged, so it cannot be followed)")
            return
        if live:
            print(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif text != printed:
            print(text, flush=True)
        printed = text
        if config.once or status.get("activity") in ENDED:
            break
        time.sleep(config.interval)
    if live:
        print()


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of ``status.json``; empty if it is missing or damaged."""
    try:
        status = json.loads((run / STATUS_FILE).read_text())
        return status if isinstance(status, dict) else {}
    except (OSError, ValueError):
        return {}


def describe(log: list[dict[str, Any]], status: dict[str, Any], now: float | None) -> str:
    """Return one line about a run: step, values of the log, time left and activity.

    Args:
        log: entries of ``log.jsonl``.
        status: content of ``status.json``.
        now: Unix time, for durations; ``None`` leaves them out.
    """
    entries = [entry for entry in log if "images_per_second" in entry]
    if not entries and not status:
        return "no log entries"
    last = entries[-1] if entries else {}
    step = max(last.get("step", 0), status.get("step", 0))
    planned = status.get("num_steps")
    parts = [
        f"step {step:,} of {planned:,} ({step / planned:.0%})" if planned else f"step {step:,}"
    ]
    parts += [f"{name} {value}" for name, value in progress_postfix(last).items()]
    held_out = next((entry for entry in reversed(log) if "held_out_loss" in entry), None)
    if held_out:
        parts.append(f"held-out {held_out['held_out_loss']:.4f} at {held_out['step']:,}")
    activity = status.get("activity", TRAINING)
    if planned and last and activity not in ENDED:
        seconds = (planned - step) * last["images"] / last["step"] / last["images_per_second"]
        parts.append(f"{_duration(seconds)} of training left")
    parts.append(activity)
    if now is not None and activity not in ENDED:
        since = _timestamp(status.get("since"))
        newest = max(since, _timestamp(last.get("time")))
        if activity != TRAINING and since:
            parts[-1] += f" for {_duration(now - since)}"
        elif newest and now - newest > QUIET_SECONDS:
            parts.append(f"last entry {_duration(now - newest)} ago")
    return ", ".join(parts)


def _timestamp(text: str | None) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
