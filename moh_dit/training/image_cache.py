"""Keep decoded images in memory, so that later epochs do not decode them again."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from ..data.images import ImageSet, read_batches


class CachedImages:
    """An ``ImageSet`` that keeps each image in memory after its first read, as uint8."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.image_size, self.class_names = images.image_size, images.class_names
        self.labels = images.labels
        self._cached = np.zeros(len(images), bool)
        # The operating system provides the memory page by page, as images are written.
        self._pixels = np.empty((len(images), self.image_size, self.image_size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not self._cached[index]:
            self.add([index], self.images[index][0])
        return self._pixels[index], int(self.labels[index])

    def fingerprint(self) -> str:
        return self.images.fingerprint()

    def add(self, indices: Sequence[int], pixels: np.ndarray) -> None:
        """Store decoded images."""
        self._pixels[indices] = pixels
        self._cached[indices] = True

    def num_cached(self) -> int:
        """Return the number of images in memory."""
        return int(np.count_nonzero(self._cached))


def decoded_gib(images: ImageSet) -> float:
    """Return the size of all images, decoded to uint8, in GiB."""
    return len(images) * images.image_size**2 * 3 / 2**30


def read_training_batches(
    images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int, num_uncached: int
) -> Generator[np.ndarray, None, None]:
    """Yield the pixels of each batch of indices, uint8 (B, S, S, 3).

    Data-loader workers read ahead. If the images are cached, the workers end when at most
    ``num_uncached`` images are not in memory. This process then reads the remaining images.
    """
    if not (isinstance(images, CachedImages) and num_workers):
        yield from (pixels for pixels, _ in read_batches(images, batches, num_workers))
        return
    indices, cache = iter(batches), images
    sent: deque[Sequence[int]] = deque()  # batches that the workers read ahead

    def batches_to_decode() -> Iterator[Sequence[int]]:
        for batch in indices:
            sent.append(batch)
            if len(cache) - cache.num_cached() <= num_uncached:
                return  # the last batch in `sent` is read below
            yield batch

    for pixels, _ in read_batches(cache.images, batches_to_decode(), num_workers):
        cache.add(sent.popleft(), pixels)
        yield pixels
    for pixels, _ in read_batches(cache, chain(sent, indices)):
        yield pixels
