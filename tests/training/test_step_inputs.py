"""The images and random numbers of a step depend only on (seed, step)."""

import itertools
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

from moh_dit.diffusion.objectives import NoiseObjective
from moh_dit.training.preemption import Preemption
from moh_dit.training.step_inputs import (
    BatchPartition,
    MicroBatchSampler,
    StepRandomNumbers,
    load_micro_batches,
)


def steps(partition, num_steps, start_step=0, **options):
    order = iter(MicroBatchSampler(10, partition, seed=3, start_step=start_step, **options))
    return [list(itertools.islice(order, partition.num_micro_batches)) for _ in range(num_steps)]


def test_each_epoch_visits_every_image_once_in_another_order():
    batches = [batch[0] for batch in steps(BatchPartition(5), 4)]
    epochs = [batches[0] + batches[1], batches[2] + batches[3]]
    for epoch in epochs:
        assert Counter(index for index, _ in epoch) == Counter(range(10))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("processes", "micro"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_partition_the_same_global_batches(processes, micro):
    whole = [batch[0] for batch in steps(BatchPartition(8), 5, flip=True)]
    partitions = [BatchPartition(8, rank, processes, micro) for rank in range(processes)]
    by_rank = [steps(partition, 5, flip=True) for partition in partitions]
    for step in range(5):
        rows = [pair for m in range(micro) for rank in range(processes)
                for pair in by_rank[rank][step][m]]  # fmt: skip
        assert rows == whole[step]


def test_starting_later_continues_the_same_stream():
    partition = BatchPartition(4)
    expected = steps(partition, 9, flip=True)[6:]
    assert steps(partition, 3, start_step=6, flip=True) == expected


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = steps(BatchPartition(25), 1)
    counts = Counter(index for index, _ in batch[0])
    assert set(counts) == set(range(10))
    assert set(counts.values()) <= {2, 3}


def test_flips_are_even_and_change_from_epoch_to_epoch():
    partition = BatchPartition(1000)
    sampler = MicroBatchSampler(1000, partition, seed=0, flip=True)
    flips = [dict(sampler.global_batch(epoch)) for epoch in range(2)]
    assert 400 < sum(flips[0].values()) < 600
    assert 400 < sum(flips[0][i] != flips[1][i] for i in range(1000)) < 600
    unflipped = MicroBatchSampler(1000, partition, seed=0).global_batch(0)
    assert not any(flip for _, flip in unflipped)


def test_random_numbers_depend_only_on_seed_and_step():
    draw_times = NoiseObjective().draw_times

    def draw(seed, step):
        device = torch.device("cpu")
        return StepRandomNumbers.draw(seed, step, (64, 4, 8, 8), draw_times, 0.25, device)

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
    part = a.rows(BatchPartition(64, 1, 2).rows(0))
    assert torch.equal(part.noise, a.noise[32:])


class Numbers:
    """Latents equal to their index; a worker that reads index ``broken`` is killed."""

    def __init__(self, broken=None):
        self.broken = broken

    def __getitems__(self, pairs):
        if self.broken in [index for index, _ in pairs]:
            os.kill(os.getpid(), signal.SIGKILL)
        indices = torch.tensor([index for index, _ in pairs])
        return indices.float(), indices


def load_numbers(latents):
    sampler = MicroBatchSampler(10, BatchPartition(5), seed=0)
    return load_micro_batches(latents, sampler, 2, torch.device("cpu"))


def test_workers_end_although_a_stored_exception_holds_the_iterator():
    with pytest.raises(RuntimeError, match=r"worker .* (killed by|exited)") as kept:
        list(load_numbers(Numbers(broken=3)))
    assert not multiprocessing.active_children(), kept.value


def test_a_worker_ignores_sigterm_even_before_its_first_line(monkeypatch):
    ignore = Preemption.ignore_in_worker

    def signal_first(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        ignore(worker)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Preemption, "ignore_in_worker", signal_first)
    batches = load_numbers(Numbers())
    seen = [label for _ in range(4) for label in next(batches)[1].tolist()]
    batches.close()
    assert Counter(seen) == Counter(list(range(10)) * 2)
    assert not multiprocessing.active_children()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
