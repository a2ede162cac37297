"""End a worker together with the launcher that started it."""

import os
import signal
import threading
import time


def end_with_launcher(seconds: float = 1.0) -> None:
    """Send SIGTERM to this process when the ``torchrun`` that started it ends.

    A launcher that is killed by SIGKILL cannot end its workers. Does nothing in a process that
    ``torchrun`` or ``accelerate launch`` did not start.

    Args:
        seconds: interval of the check.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
