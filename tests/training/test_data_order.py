"""Data order and randomness depend on (seed, step) alone."""

import itertools
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

from moh_dit.diffusion.objectives import NoiseObjective
from moh_dit.training.data_order import DataOrder, Share, StepRandom, load
from moh_dit.training.preemption import Preemption


def steps(share, num_steps, start_step=0, **options):
    order = iter(DataOrder(10, share, seed=3, start_step=start_step, **options))
    return [list(itertools.islice(order, share.num_micro_batches)) for _ in range(num_steps)]


def test_each_epoch_visits_every_image_once_in_another_order():
    batches = [batch[0] for batch in steps(Share(5), 4)]
    epochs = [batches[0] + batches[1], batches[2] + batches[3]]
    for epoch in epochs:
        assert Counter(index for index, _ in epoch) == Counter(range(10))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("processes", "micro"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_processes_and_micro_batches_share_the_same_global_batches(processes, micro):
    whole = [batch[0] for batch in steps(Share(8), 5, flip=True)]
    shares = [steps(Share(8, rank, processes, micro), 5, flip=True) for rank in range(processes)]
    for step in range(5):
        rows = [pair for m in range(micro) for rank in range(processes)
                for pair in shares[rank][step][m]]  # fmt: skip
        assert rows == whole[step]


def test_starting_later_continues_the_same_stream():
    assert steps(Share(4), 3, start_step=6, flip=True) == steps(Share(4), 9, flip=True)[6:]


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = steps(Share(25), 1)
    counts = Counter(index for index, _ in batch[0])
    assert set(counts) == set(range(10))
    assert set(counts.values()) <= {2, 3}


def test_flips_are_even_and_change_from_epoch_to_epoch():
    order = DataOrder(1000, Share(1000), seed=0, flip=True)
    flips = [dict(order.global_batch(epoch)) for epoch in range(2)]
    assert 400 < sum(flips[0].values()) < 600
    assert 400 < sum(flips[0][i] != flips[1][i] for i in range(1000)) < 600
    assert not any(flip for _, flip in DataOrder(1000, Share(1000), seed=0).global_batch(0))


def test_random_numbers_are_a_function_of_seed_and_step():
    draw_times = NoiseObjective().draw_times

    def draw(seed, step):
        device = torch.device("cpu")
        return StepRandom.draw(seed, step, (64, 4, 8, 8), draw_times, 0.25, device)

    a, b = draw(1, 7), draw(1, 7)
    assert all(torch.equal(x, vars(b)[name]) for name, x in vars(a).items())
    for other in (draw(1, 8), draw(2, 7)):
        assert not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.noise, a.posterior_noise)
    many = [draw(0, step) for step in range(40)]
    timesteps = torch.cat([r.times for r in many])
    assert timesteps.min() < 5
    assert timesteps.max() > 994
    assert abs(torch.cat([r.drop_label for r in many]).float().mean() - 0.25) < 0.04
    part = a.rows(Share(64, 1, 2).rows(0))
    assert torch.equal(part.noise, a.noise[32:])


class Numbers:
    """Latents that are their index; the worker that reads ``broken`` is killed."""

    def __init__(self, broken=None):
        self.broken = broken

    def __getitems__(self, pairs):
        if self.broken in [index for index, _ in pairs]:
            os.kill(os.getpid(), signal.SIGKILL)
        indices = torch.tensor([index for index, _ in pairs])
        return indices.float(), indices


def loaded(latents):
    return load(latents, DataOrder(10, Share(5), seed=0), 2, torch.device("cpu"))


def test_workers_end_with_an_error_that_is_kept():
    with pytest.raises(RuntimeError, match=r"worker .* (killed by|exited)") as kept:
        list(loaded(Numbers(broken=3)))
    assert not multiprocessing.active_children(), kept.value  # whose frames hold the iterator


def test_a_worker_that_is_told_to_stop_before_its_first_line_works_on(monkeypatch):
    leave = Preemption.leave_to_trainer

    def told_first(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        leave(worker)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Preemption, "leave_to_trainer", told_first)
    batches = loaded(Numbers())
    seen = [label for _ in range(4) for label in next(batches)[1].tolist()]
    batches.close()
    assert Counter(seen) == Counter(list(range(10)) * 2)
    assert not multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
