"""Report a run while it trains: log, trackers, progress bar and ``status.json``."""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fid_eval.progress import SECONDS_BETWEEN_LINES, progress_bar

from ..common.atomic_write import atomic_write
from .run_log import LOG_FILE, RunLog, dead_heads, plot_curves, progress_postfix
from .trackers import track_entry

STATUS_FILE = "status.json"
TRAINING = "training"
ENDED = ("finished", "stopped", "failed")


class RunProgress:
    """Reports the progress of one training run, inside its ``with`` block.

    Only rank 0 writes and prints. ``status.json`` names the current activity and its start.

    Args:
        accelerator: the processes and trackers of the run.
        run_dir: the run folder, which exists.
        step: number of completed steps.
        num_steps: number of steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, step: int, num_steps: int):
        self.accelerator, self.run_dir = accelerator, run_dir
        self.step, self.num_steps = step, num_steps
        self.enabled, self.activity = accelerator.is_main_process, TRAINING
        self.bar = progress_bar(
            num_steps, desc=TRAINING, unit="step", initial=step, enabled=self.enabled
        )
        if self.enabled:
            self.run_log = RunLog(run_dir / LOG_FILE, step)
            self._write_status()

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(self, failed: type[BaseException] | None, *error: object) -> None:
        self.bar.close()
        finished, stopped, failure = ENDED
        if self.enabled:
            ended = finished if self.step == self.num_steps else stopped
            # A failed write must not replace the error that ended the block.
            with suppress(OSError) if failed else nullcontext():
                self.activity = failure if failed else ended
                self._write_status()

    def update(self) -> None:
        """Count one step."""
        self.step += 1
        self.bar.update()

    def log(self, entry: dict[str, Any]) -> None:
        """Write an entry with the key ``step`` to the log, the trackers and the progress bar."""
        if not self.enabled:
            return
        self.run_log.write(entry)
        track_entry(self.accelerator, entry)
        self.bar.set_postfix(progress_postfix(entry))
        if dead := dead_heads(entry):
            print(f"step {entry['step']}: no token chose {', '.join(dead)}")

    def plot(self) -> None:
        """Draw ``curves.png``."""
        if self.enabled:
            plot_curves(self.run_dir / LOG_FILE, self.run_dir / "curves.png")

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show an activity such as ``"saving"`` and its duration while the block runs.

        The progress bar shows the duration every second, a log file every 15 seconds. After the
        block, the activity around it continues.
        """
        if not self.enabled:
            yield
            return
        outer, self.activity = self.activity, activity
        self._write_status()
        start, ended = time.monotonic(), threading.Event()

        def show() -> None:
            while not ended.wait(1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES):
                if self.activity == activity:  # otherwise a block inside this one is running
                    self.bar.set_description_str(f"{activity} for {time.monotonic() - start:.0f} s")

        thread = threading.Thread(target=show, name="activity", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.activity = outer
            self.bar.set_description_str(outer, refresh=False)
        self._write_status()

    def _write_status(self) -> None:
        write_status(self.run_dir, self.activity, self.step, self.num_steps)


def write_status(run_dir: Path, activity: str, step: int, num_steps: int) -> None:
    """Write ``status.json``: the activity of a run, its start, the steps and the process."""
    status = {
        "activity": activity,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "num_steps": num_steps,
        "host": platform.node(),
        "pid": os.getpid(),
    }
    atomic_write(run_dir / STATUS_FILE, json.dumps(status).encode())


@contextmanager
def doing_before_training(
    accelerator: Accelerator, run_dir: Path, activity: str, step: int, num_steps: int
) -> Iterator[None]:
    """Name an activity in ``status.json`` before the run has a :class:`RunProgress`.

    A failure removes the file: it would make an empty run folder need ``--resume``. Runs that have
    all their steps keep their file.
    """
    if not accelerator.is_main_process or step >= num_steps:
        yield
        return
    write_status(run_dir, activity, step, num_steps)
    try:
        yield
    except BaseException:
        (run_dir / STATUS_FILE).unlink(missing_ok=True)
        raise
