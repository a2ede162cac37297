"""Choose the images and the random numbers of each training step.

Both depend only on (seed, step), not on the number of processes or on earlier draws. A run can
therefore resume exactly on any number of processes, and checkpoints contain no RNG state.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common.compat import shut_down_workers
from ..common.errors import UserError
from ..data.latents import LatentSet
from .preemption import Preemption


@dataclass(frozen=True)
class BatchPartition:
    """The partition of each global batch into ranks and micro-batches."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_micro_batches: int = 1

    @property
    def micro_batch_size(self) -> int:
        """Number of images in one micro-batch of one rank."""
        return self.batch_size // (self.world_size * self.num_micro_batches)

    def rows(self, micro_batch: int) -> slice:
        """Return the rows of the global batch that form this rank's micro-batch."""
        start = (micro_batch * self.world_size + self.rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


class MicroBatchSampler:
    """Batch sampler over an endless sequence of shuffled epochs.

    It yields a list of ``(index, flip)`` pairs for each micro-batch of this rank, from
    ``start_step`` on. Global batch ``s`` consists of positions ``s·B … (s+1)·B - 1`` of the
    sequence, where B is the global batch size.

    Args:
        num_images: number of images in the data.
        partition: rank, world size and micro-batches.
        seed: seed of the order and of the flips.
        flip: draw a flip for each image; without it, no image is mirrored.
        start_step: first step.
        images: indices of the images to draw (N,); ``None`` for all.
    """

    def __init__(
        self,
        num_images: int,
        partition: BatchPartition,
        seed: int,
        flip: bool = False,
        start_step: int = 0,
        images: np.ndarray | None = None,
    ):
        self.num_images = num_images if images is None else len(images)
        self.images = images
        self.partition = partition
        self.seed = seed
        self.flip = flip
        self.start_step = start_step
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        step = self.start_step
        while True:
            batch = self.global_batch(step)
            for micro_batch in range(self.partition.num_micro_batches):
                yield batch[self.partition.rows(micro_batch)]
            step += 1

    def global_batch(self, step: int) -> list[tuple[int, bool]]:
        """Return ``(index, flip)`` of each image in the global batch of a step."""
        start = step * self.partition.batch_size
        return [self._at(position) for position in range(start, start + self.partition.batch_size)]

    def _at(self, position: int) -> tuple[int, bool]:
        epoch, offset = divmod(position, self.num_images)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, 0, epoch))
            order = random.permutation(self.num_images)
            self._epoch = (epoch, order, random.integers(2, size=self.num_images, dtype=np.uint8))
        _, order, flips = self._epoch
        index = order[offset] if self.images is None else self.images[order[offset]]
        return int(index), self.flip and bool(flips[offset])


def load_micro_batches(
    latents: LatentSet, sampler: MicroBatchSampler, num_workers: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield posterior moments (b, 2C, h, w) and labels (b,) on ``device``, without end.

    Raises:
        UserError: a damaged record of latents, with the same message from any worker.
    """
    loader = DataLoader(
        _BatchReader(latents),
        batch_sampler=sampler,
        collate_fn=_return_unchanged,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=Preemption.ignore_in_worker,
    )
    with Preemption.blocked():
        batches: Any = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            moments, labels = batch
            yield moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    finally:
        # Workers ignore SIGTERM, so shut them down explicitly.
        if num_workers:
            shut_down_workers(batches)


class _BatchReader(Dataset):
    """Read batches, and return a ``UserError`` as a value.

    If a data-loader worker raised it, the user would see a traceback.
    """

    def __init__(self, latents: LatentSet):
        self.latents = latents

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> Any:
        try:
            return self.latents.__getitems__(items)
        except UserError as error:
            return error


def _return_unchanged(batch: Any) -> Any:
    # LatentSet.__getitems__ returns a whole batch, so there is nothing to collate.
    return batch


@dataclass
class StepRandomNumbers:
    """The random numbers of one step, for the global batch of B latents (C, h, w)."""

    posterior_noise: Tensor  # (B, C, h, w), to sample the autoencoder's posterior
    noise: Tensor  # (B, C, h, w), ε
    times: Tensor  # (B,), as the objective samples them
    drop_label: Tensor  # bool (B,)

    @classmethod
    def draw(
        cls,
        seed: int,
        step: int,
        shape: tuple[int, ...],
        draw_times: Callable[[int, torch.Generator], Tensor],
        label_dropout: float,
        device: torch.device,
    ) -> "StepRandomNumbers":
        """Draw the numbers of the global batch; ``shape`` is (B, C, h, w)."""
        # SeedSequence hashes its input, so consecutive steps get unrelated generators.
        mixed = int(np.random.SeedSequence((seed, 1, step)).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(mixed >> 1)
        options: Any = dict(device=device, generator=generator)
        return cls(
            posterior_noise=torch.randn(shape, **options),
            noise=torch.randn(shape, **options),
            times=draw_times(shape[0], generator),
            drop_label=torch.rand(shape[:1], **options) < label_dropout,
        )

    def rows(self, rows: slice) -> "StepRandomNumbers":
        """Return the numbers of these rows of the global batch."""
        return StepRandomNumbers(*(getattr(self, each.name)[rows] for each in fields(self)))


# Posterior moments (b, 2C, h, w), labels (b,) and random numbers.
MicroBatch: TypeAlias = tuple[Tensor, Tensor, StepRandomNumbers]


def clone_micro_batch(micro_batch: MicroBatch) -> MicroBatch:
    """Return a copy of a micro-batch in new memory."""
    moments, labels, random = micro_batch
    copies = {each.name: getattr(random, each.name).clone() for each in fields(random)}
    return moments.clone(), labels.clone(), StepRandomNumbers(**copies)


def copy_micro_batch_(target: MicroBatch, source: MicroBatch) -> None:
    """Copy a micro-batch into the memory of another one."""
    for name in (each.name for each in fields(StepRandomNumbers)):
        getattr(target[2], name).copy_(getattr(source[2], name))
    target[0].copy_(source[0])
    target[1].copy_(source[1])
