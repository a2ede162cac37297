"""Test the order, limits, cancellation and failures of the job queue."""

import threading

import pytest

from moh_dit.common.errors import UserError
from moh_dit.web.job_queue import FINISHED, FINISHED_JOBS_KEPT, Job, JobQueue, QueueFull

PATIENCE = 60


class Watched(Job):
    """A job that records its states and can be waited for."""

    def __init__(self, request=None):
        self.news, self.ended = [], threading.Event()
        super().__init__(request, self.remember)

    def remember(self):
        self.news.append(self.state)
        if self.state["status"] in FINISHED:
            self.ended.set()

    def end(self):
        assert self.ended.wait(PATIENCE)
        return self.state


class Work:
    """Work in three steps, each of which waits for ``release``."""

    def __init__(self):
        self.begun, self.steps, self.order = threading.Event(), threading.Semaphore(0), []

    def __call__(self, job):
        self.order.append(job.request)
        self.begun.set()
        for _ in range(3):
            assert self.steps.acquire(timeout=PATIENCE)
            job.raise_if_cancelled()
        if isinstance(job.request, Exception):
            raise job.request
        job.files["made"] = b"!"
        return {"made": job.request}

    def release(self, steps=1000):
        self.steps.release(steps)


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def jobs(work):
    jobs = JobQueue(work, max_waiting=2)
    yield jobs
    work.release()
    jobs.close()


def submit(jobs, work, *requests):
    """Submit jobs; return when the first one runs."""
    submitted = []
    for request in requests:
        submitted.append(Watched(request))
        jobs.submit(submitted[-1])
        assert work.begun.wait(PATIENCE)
    return submitted


def test_jobs_run_in_order_and_publish_their_position(jobs, work):
    first, second, third = submit(jobs, work, "a", "b", "c")
    assert [job.state["ahead"] for job in (second, third)] == [1, 2]
    with pytest.raises(QueueFull, match="try again"):
        jobs.submit(Watched("d"))
    work.release()
    assert [job.end()["made"] for job in (first, second, third)] == ["a", "b", "c"]
    assert work.order == ["a", "b", "c"]
    assert [news["ahead"] for news in third.news[:-1]] == [2, 1, 0]
    assert jobs.find(second.id).files == {"made": b"!"}


def test_cancelling_the_running_job_frees_the_queue(jobs, work):
    running, waiting = submit(jobs, work, "a", "b")
    jobs.cancel(running)
    assert running.state["status"] == "waiting"  # until its step has ended
    work.release(1)
    assert running.end() == {"status": "cancelled"}
    work.release()
    assert waiting.end()["status"] == "done"
    jobs.cancel(waiting)
    assert waiting.state["status"] == "done"


def test_cancelling_a_waiting_job_moves_the_others_up(jobs, work):
    running, second, third = submit(jobs, work, "a", "b", "c")
    jobs.cancel(second)
    assert second.state == {"status": "cancelled"}
    assert third.state["ahead"] == 1
    work.release()
    assert third.end()["status"] == running.end()["status"] == "done"
    assert work.order == ["a", "c"]


def test_a_failed_job_has_a_message_and_the_next_one_runs(jobs, work, capsys):
    mistake, broken, after = submit(jobs, work, UserError("too big"), KeyError("x"), "b")
    work.release()
    assert mistake.end() == {"status": "failed", "error": "too big"}
    assert broken.end()["error"] == "the server failed to sample; see the traceback in its log"
    assert after.end()["status"] == "done"
    assert "KeyError: 'x'" in capsys.readouterr().err


def test_old_results_are_discarded_and_ids_are_random(jobs, work):
    work.release()
    made = [Watched(number) for number in range(FINISHED_JOBS_KEPT + 1)]
    for job in made:
        jobs.submit(job)
        job.end()
    assert jobs.find(made[0].id) is None
    assert jobs.find(made[1].id) is made[1]
    assert len({job.id for job in made}) == len(made)
    assert min(len(job.id) for job in made) >= 22  # 128 bits
    for _ in range(FINISHED_JOBS_KEPT):  # cancelled requests replace no results
        jobs.submit(cancelled := Watched("x"))
        jobs.cancel(cancelled)
        cancelled.end()
    assert jobs.find(made[1].id) is made[1]


def test_closing_cancels_everything(work):
    jobs = JobQueue(work, max_waiting=2)
    running, waiting = submit(jobs, work, "a", "b")
    closing = threading.Thread(target=jobs.close)
    closing.start()
    assert waiting.end() == {"status": "cancelled"}
    work.release()
    closing.join()
    assert running.end() == {"status": "cancelled"}
    with pytest.raises(QueueFull, match="shutting down"):
        jobs.submit(Watched("c"))
