"""Start a process that owns an output folder and does nothing else."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

OWNER = """
import sys, time
from pathlib import Path
from moh_dit.common.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), kernel_lock=sys.argv[2] == "True", beat_seconds=0.2)
lock.acquire()
print("acquired", flush=True)
time.sleep(60)
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def folder_owner(folder, kernel_lock=True):
    """Start the process, yield it when it owns ``folder``, and end it by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), str(kernel_lock)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == b"acquired\n"
        yield process
    finally:
        process.kill()
        process.communicate()
