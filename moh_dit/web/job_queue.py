"""Run sampling jobs one at a time, from a bounded queue, with cancellation."""

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from ..common.errors import UserError

FINISHED = ("done", "cancelled", "failed")
SECONDS_TO_STOP = 10
FINISHED_JOBS_KEPT = 16


class Cancelled(Exception):
    """Raised inside the work of a cancelled job."""


class QueueFull(UserError):
    """Raised when a job cannot be queued because too many jobs are waiting."""


class Job:
    """One request, from waiting to finished. Any thread may read it.

    Args:
        request: the checked settings of the request.
        on_change: called after each change of ``state``, by the thread that made the change.

    Attributes:
        id: random identifier. Whoever knows it may see and cancel the job.
        state: status and progress, replaced as one dictionary. ``status`` is waiting, running, or
            one of ``FINISHED``.
        files: results, by file name.
    """

    def __init__(self, request: Any, on_change: Callable[[], None] = lambda: None):
        self.request, self.on_change = request, on_change
        self.id = secrets.token_urlsafe(16)
        self.files: dict[str, bytes] = {}
        self.state: dict[str, Any] = {"status": "waiting", "ahead": 0}
        self.cancelled = threading.Event()

    def publish(self, status: str, **details: Any) -> None:
        """Replace ``state`` and call ``on_change``."""
        self.state = {"status": status, **details}
        self.on_change()

    def raise_if_cancelled(self) -> None:
        """Raise :class:`Cancelled` if the job is cancelled. Its work calls this at each step."""
        if self.cancelled.is_set():
            raise Cancelled


class JobQueue:
    """Runs jobs one after the other in order of submission.

    Args:
        work: runs a job: fills its ``files`` and returns the details of its final state.
        max_waiting: maximum number of jobs that wait behind the running one.
    """

    def __init__(self, work: Callable[[Job], dict[str, Any]], max_waiting: int):
        self.work, self.max_waiting = work, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._finished: deque[Job] = deque(maxlen=FINISHED_JOBS_KEPT)
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a job to the queue.

        Raises:
            QueueFull: ``max_waiting`` jobs are waiting already, or the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise QueueFull("the server is shutting down")
            if len(self._waiting) >= self.max_waiting + (self._running is None):
                raise QueueFull("too many requests are waiting; try again later")
            self._waiting.append(job)
            self._publish_positions()
            self._changed.notify()

    def find(self, job_id: str) -> Job | None:
        """Return the job with this id, or ``None`` if it is unknown or was discarded."""
        with self._changed:
            jobs = filter(None, (*self._finished, self._running, *self._waiting))
            return next((job for job in jobs if job.id == job_id), None)

    def cancel(self, job: Job) -> None:
        """Remove a waiting job from the queue; stop a running job at its next step."""
        with self._changed:
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, "cancelled")

    def close(self) -> None:
        """Cancel all jobs and wait up to ``SECONDS_TO_STOP`` for the running one to stop."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *filter(None, [self._running])]:
                self.cancel(job)
            self._changed.notify()
        self._thread.join(SECONDS_TO_STOP)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
            status, details = self._run_job(job)
            with self._changed:
                self._running = None
                self._finish(job, status, **details)

    def _run_job(self, job: Job) -> tuple[str, dict[str, Any]]:
        try:
            job.raise_if_cancelled()
            return "done", self.work(job)
        except Cancelled:
            job.files.clear()
            return "cancelled", {}
        except UserError as error:
            return "failed", {"error": str(error)}
        except Exception:
            # The server must survive any failure of a job; the traceback goes to its log.
            traceback.print_exc()
            return "failed", {"error": "the server failed to sample; see the traceback in its log"}

    def _finish(self, job: Job, status: str, **details: Any) -> None:
        if status == "done":  # cancelled requests must not replace the images of other visitors
            self._finished.append(job)
        job.publish(status, **details)
        self._publish_positions()

    def _publish_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            job.publish("waiting", ahead=position + (self._running is not None))
