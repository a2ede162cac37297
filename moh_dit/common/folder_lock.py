"""Give an output folder one owner at a time.

``FOLDER/.owner.json`` names the owner. The owner holds a kernel lock (``flock``) on this file,
which the kernel releases when the process ends. It also renews the modification time of the file:
its heartbeat. Between processes of one host the kernel lock decides. Between hosts, and on file
systems without kernel locks, the heartbeat decides. Some network file systems keep kernel locks
local to a host.
"""

import fcntl
import json
import os
import secrets
import sys
import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from fid_eval.atomic_write import HOST, remove_leftovers, temporary_path

from .errors import UserError

OWNER_FILE = ".owner.json"
SETTLING_SECONDS = 1.0  # without kernel locks, the last of several new owners within this time wins

_held: set["FolderLock"] = set()


class FolderLock:
    """Ownership of an output folder by this process.

    Acquiring a folder that this process owns already has no effect.

    Args:
        folder: the output folder. It is created, and removed on release if it is still empty.
        kernel_lock: use ``flock`` where the file system has it.
        beat_seconds: interval of the heartbeat.
        stale_seconds: an owner whose heartbeat is silent for this time has ended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kernel_lock: bool = True,
        beat_seconds: float = 10.0,
        stale_seconds: float = 60.0,
    ):
        self.folder, self.path, self.kernel_lock = folder, folder / OWNER_FILE, kernel_lock
        self.beat_seconds, self.stale_seconds = beat_seconds, stale_seconds
        self._file: FileIO | None = None  # open while this process is the owner
        self._content = b""
        self._made: list[Path] = []
        self._released = threading.Event()

    def acquire(self) -> None:
        """Become the owner of the folder, and remove what killed processes left in it.

        If it is unknown whether the owner has ended, wait until its heartbeat is renewed or stale.

        Raises:
            UserError: another process owns the folder, or the folder cannot be written.
        """
        folder = self.folder.resolve()
        if any(lock.folder.resolve() == folder for lock in _held):
            return
        self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try_to_acquire():
                pass
        except OSError as error:
            self._remove_made()
            raise UserError(f"{self.folder} cannot be written: {error}") from None
        _held.add(self)
        remove_leftovers(self.folder, owned=True)
        self._thread = threading.Thread(target=self._beat, args=(self._file,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``UserError`` if the folder was removed, or has another owner by now."""
        if self._file is None:
            return
        if not (content := self._read_path()):
            raise UserError(
                f"{self.folder} was removed or moved while this process wrote to it; nothing more "
                "is written"
            )
        if content != self._content:
            raise self._in_use(_parse(content))

    def release(self) -> None:
        """Give the folder up, and remove it if it is empty and :meth:`acquire` created it."""
        if self._file is None:
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self._read_path() == self._content:
                self.path.unlink()
                self._remove_made()
        self._file.close()
        self._file = None
        _held.discard(self)

    def _try_to_acquire(self) -> bool:
        """Become the owner; return False if the owner file changed at the same time."""
        with ExitStack() as opened:
            file = opened.enter_context(self.path.open("a+b", buffering=0))
            locked = self._lock(file)
            owner = _read_owner(file, attempts=10 if locked is False else 1)
            if locked is False:
                raise self._in_use(owner)
            if owner and (owner["host"] != HOST or not (locked or _has_ended(owner))):
                self._wait_for_silence(file, owner)
            self._content = _describe_this_process()
            file.truncate(0)
            file.write(self._content)
            with suppress(OSError):  # shows the record to other hosts at once
                os.fsync(file.fileno())
            if not locked:
                time.sleep(SETTLING_SECONDS)
            # The previous owner may have removed the file before it was locked here.
            if self._read_path() != self._content:
                return False
            self._file = file
            opened.pop_all()
        return True

    def _lock(self, file: FileIO) -> bool | None:
        """Return whether this process got the kernel lock; None if the file system has none."""
        if not self.kernel_lock:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _wait_for_silence(self, file: FileIO, owner: dict[str, Any]) -> None:
        """Wait until the heartbeat has been silent for ``stale_seconds``.

        Raises:
            UserError: the heartbeat was renewed.
        """
        beat = os.fstat(file.fileno()).st_mtime
        probe = temporary_path(self.path)
        probe.touch()  # shows the clock of the file system, which may differ from that of this host
        silence = probe.stat().st_mtime - beat
        probe.unlink()
        remaining = min(self.stale_seconds - silence, self.stale_seconds)
        if remaining > 0:
            print(
                f"{self.folder} may still be in use by {_describe(owner)}: waiting for its "
                f"heartbeat, up to {remaining:.0f} s",
                file=sys.stderr,
            )
        end = time.monotonic() + remaining
        while time.monotonic() < end:
            time.sleep(min(1.0, self.beat_seconds / 2))
            with suppress(FileNotFoundError), self.path.open("rb") as seen:
                # A file is opened again, because NFS caches the times of an open file.
                if os.fstat(seen.fileno()).st_mtime != beat:
                    raise self._in_use(owner)

    def _beat(self, file: FileIO) -> None:
        while True:
            with suppress(OSError):
                os.utime(file.fileno())
            if self._released.wait(self.beat_seconds):
                return

    def _read_path(self) -> bytes:
        """Return the content of the owner file; empty if the file or the folder is gone."""
        try:
            return self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def _in_use(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.folder} is in use by {_describe(owner)}: wait until it ends, or give another "
            "name"
        )

    def _remove_made(self) -> None:
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()


def _describe_this_process() -> bytes:
    program = Path(sys.argv[0])
    record = {
        "host": HOST,
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(" ", "seconds"),
        "program": program.parent.name if program.stem == "__main__" else program.name,
        "token": secrets.token_hex(8),  # no other owner has the same content
    }
    return json.dumps(record, indent=1).encode()


def _read_owner(file: FileIO, attempts: int) -> dict[str, Any]:
    """Return the record in an owner file, which the owner may still be writing; else empty."""
    for _ in range(attempts):
        file.seek(0)
        if owner := _parse(file.read()):
            return owner
        time.sleep(0.02)
    return {}


def _parse(content: bytes) -> dict[str, Any]:
    """Return the record of an owner; empty if it is incomplete or damaged."""
    try:
        record = json.loads(content)
        pid, host = int(record["pid"]), str(record["host"])
    except (ValueError, LookupError, TypeError):
        return {}
    return {**record, "pid": pid, "host": host} if 0 < pid < 1 << 31 else {}


def _has_ended(owner: dict[str, Any]) -> bool:
    """Return whether no process of this host has the owner's process id."""
    return not psutil.pid_exists(owner["pid"])


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return (
        f"{owner.get('program')}, process {owner['pid']} on host {owner['host']}, started "
        f"{owner.get('started')}"
    )


def _forget_in_child() -> None:
    """Close the owner files in a forked process, which would keep the locks after its parent."""
    for lock in _held:
        if lock._file is not None:
            lock._file.close()
            lock._file = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
