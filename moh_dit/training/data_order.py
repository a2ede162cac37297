"""What a step sees: its images and its random numbers, as functions of (seed, step) alone.

Nothing here depends on how many processes there are or on what was drawn before. A resumed run, on
as many processes as one likes, therefore goes on exactly where the other stopped, and no RNG state
is saved.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.latents import LatentSet
from .preemption import Preemption


@dataclass(frozen=True)
class Share:
    """The rows of a global batch that one process works on, one micro-batch after the other."""

    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    num_micro_batches: int = 1

    @property
    def micro_batch_size(self) -> int:
        """Images a process works on at once."""
        return self.batch_size // (self.num_processes * self.num_micro_batches)

    def rows(self, micro_batch: int) -> slice:
        """Rows of the global batch in this process's micro-batch."""
        start = (micro_batch * self.num_processes + self.process_index) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


class DataOrder:
    """Batch sampler: an endless stream of shuffled epochs, cut into global batches.

    Yields, micro-batch by micro-batch from ``start_step`` on, lists of ``(index, flip)`` pairs for
    this process. Global batch ``s`` is positions ``s·B … (s+1)·B - 1`` of the stream.
    """

    def __init__(
        self, num_images: int, share: Share, seed: int, flip: bool = False, start_step: int = 0
    ):
        self.num_images = num_images
        self.share = share
        self.seed = seed
        self.flip = flip
        self.start_step = start_step
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        step = self.start_step
        while True:
            batch = self.global_batch(step)
            for micro_batch in range(self.share.num_micro_batches):
                yield batch[self.share.rows(micro_batch)]
            step += 1

    def global_batch(self, step: int) -> list[tuple[int, bool]]:
        """``(index, flip)`` of every image of a step."""
        start = step * self.share.batch_size
        return [self._at(position) for position in range(start, start + self.share.batch_size)]

    def _at(self, position: int) -> tuple[int, bool]:
        epoch, offset = divmod(position, self.num_images)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, 0, epoch))
            order = random.permutation(self.num_images)
            self._epoch = (epoch, order, random.integers(2, size=self.num_images, dtype=np.uint8))
        _, order, flips = self._epoch
        return int(order[offset]), self.flip and bool(flips[offset])


def load(
    latents: LatentSet, order: DataOrder, num_workers: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Endless micro-batches of posterior moments (b, 2C, h, w) and labels (b,), on ``device``."""
    loader = DataLoader(
        latents,
        batch_sampler=order,
        collate_fn=_as_fetched,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=Preemption.leave_to_trainer,
    )
    with Preemption.withheld():
        batches: Any = iter(loader)
    try:
        for moments, labels in batches:
            yield moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    finally:
        # Workers hear no SIGTERM, by which they end otherwise where an error keeps the iterator.
        if num_workers:
            batches._shutdown_workers()


def _as_fetched(batch: Any) -> Any:
    """The data set hands over whole batches (``__getitems__``)."""
    return batch


@dataclass
class StepRandom:
    """The random numbers of one step, for the global batch of B latents (C, h, w)."""

    posterior_noise: Tensor  # (B, C, h, w), for drawing from the autoencoder's posterior
    noise: Tensor  # (B, C, h, w), ε
    times: Tensor  # (B,), as the objective draws them
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
    ) -> "StepRandom":
        """Draw for the global batch; ``shape`` is (B, C, h, w)."""
        # SeedSequence mixes well: neighbouring steps get unrelated generators.
        mixed = int(np.random.SeedSequence((seed, 1, step)).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(mixed >> 1)
        options: Any = dict(device=device, generator=generator)
        return cls(
            posterior_noise=torch.randn(shape, **options),
            noise=torch.randn(shape, **options),
            times=draw_times(shape[0], generator),
            drop_label=torch.rand(shape[:1], **options) < label_dropout,
        )

    def rows(self, rows: slice) -> "StepRandom":
        """The part of one micro-batch."""
        return StepRandom(**{name: value[rows] for name, value in vars(self).items()})
