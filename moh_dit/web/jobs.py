"""Requests in turn: one model, one worker thread, a bounded queue, and cancelling that works."""

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from ..common.errors import UserError

FINISHED = ("done", "cancelled", "failed")
SECONDS_TO_STOP = 10
KEPT = 16  # finished jobs whose files can still be fetched


class Cancelled(Exception):
    """Raised inside the work of a job that nobody wants any more."""


class QueueFull(UserError):
    """So many requests are waiting that this one must come back later."""


class Job:
    """One request on its way. Any thread may read it.

    Args:
        request: what is asked for, checked.
        on_change: called after every change of ``state``, from whichever thread made it.

    Attributes:
        id: cannot be guessed: who knows it may see and cancel the job.
        state: the news in one dictionary, replaced as a whole; ``status`` is waiting,
            running, or one of ``FINISHED``.
        files: what was made, by name.
    """

    def __init__(self, request: Any, on_change: Callable[[], None] = lambda: None):
        self.request, self.on_change = request, on_change
        self.id = secrets.token_urlsafe(16)
        self.files: dict[str, bytes] = {}
        self.state: dict[str, Any] = {"status": "waiting", "ahead": 0}
        self.unwanted = threading.Event()

    def publish(self, status: str, **news: Any) -> None:
        """Replace ``state`` and tell."""
        self.state = {"status": status, **news}
        self.on_change()

    def stop_if_unwanted(self) -> None:
        """Raise :class:`Cancelled` once the job is cancelled; the work calls it often."""
        if self.unwanted.is_set():
            raise Cancelled


class JobQueue:
    """Runs jobs one after the other, first come, first served.

    Args:
        work: makes what a job asks for, fills its ``files`` and returns its last news.
        max_waiting: jobs that may wait behind the one that runs.
    """

    def __init__(self, work: Callable[[Job], dict[str, Any]], max_waiting: int):
        self.work, self.max_waiting = work, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._finished: deque[Job] = deque(maxlen=KEPT)
        self._closed = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in the queue.

        Raises:
            QueueFull: when ``max_waiting`` jobs wait already, or the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise QueueFull("the server is about to end")
            if len(self._waiting) >= self.max_waiting + (self._running is None):
                raise QueueFull("too many requests are waiting already; try again in a while")
            self._waiting.append(job)
            self._tell_places()
            self._changed.notify()

    def find(self, job_id: str) -> Job | None:
        """The job of that id, unless it was never there or is long gone."""
        with self._changed:
            running = [self._running] if self._running else []
            jobs = {job.id: job for job in (*self._finished, *running, *self._waiting)}
        return jobs.get(job_id)

    def cancel(self, job: Job) -> None:
        """Take a waiting job out of the queue; stop a running one at its next step."""
        with self._changed:
            job.unwanted.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
                self._tell_places()

    def close(self) -> None:
        """Cancel everything and wait for the worker, though not for a step of a giant on a CPU."""
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
            status, news = self._outcome(job)
            with self._changed:
                self._running = None
                self._end(job, status, **news)
                self._tell_places()

    def _outcome(self, job: Job) -> tuple[str, dict[str, Any]]:
        try:
            job.stop_if_unwanted()
            return "done", self.work(job)
        except Cancelled:
            job.files.clear()
            return "cancelled", {}
        except UserError as error:
            return "failed", {"error": str(error)}
        except Exception:
            # The page must outlive a bad request; what happened belongs in the server's log.
            traceback.print_exc()
            return "failed", {"error": "the server failed at this; its log says how"}

    def _end(self, job: Job, status: str, **news: Any) -> None:
        self._finished.append(job)
        job.publish(status, **news)

    def _tell_places(self) -> None:
        for place, job in enumerate(self._waiting):
            job.publish("waiting", ahead=place + (self._running is not None))
