"""Keep decoded images in memory, and feed batches of pixels to the device."""

from collections.abc import Generator, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fid_eval.distributed import move_if_small
from fid_eval.progress import progress_bar

from ..data.images import ImageSet, index_batches, read_batches

IMAGES_PER_READ = 64


class CachedImages:
    """An ``ImageSet`` in memory: all images are decoded once, when the object is created.

    Args:
        images: the images to decode.
        num_workers: data-loader workers that decode them.
        progress: show a progress bar.

    Attributes:
        pixels: uint8 (N, S, S, 3).

    Raises:
        UserError: an image cannot be read.
    """

    def __init__(self, images: ImageSet, num_workers: int = 0, progress: bool = False):
        self.images = images
        self.image_size, self.class_names = images.image_size, images.class_names
        self.labels = images.labels
        size = images.image_size
        self.pixels = torch.empty((len(images), size, size, 3), dtype=torch.uint8)
        batches = index_batches(range(len(images)), IMAGES_PER_READ)
        read = read_batches(images, batches, num_workers)
        with progress_bar(len(images), desc="decoding", unit="img", enabled=progress) as bar:
            for indices, (pixels, _) in zip(batches, read, strict=True):
                self.pixels[indices[0] : indices[-1] + 1] = torch.from_numpy(pixels)
                bar.update(len(indices))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index].numpy(), int(self.labels[index])

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def decoded_gib(images: ImageSet) -> float:
    """Return the size of all images, decoded to uint8, in GiB."""
    return len(images) * images.image_size**2 * 3 / 2**30


def pixel_batches(
    images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """Yield the pixels of each batch of indices, uint8 (B, S, S, 3), on ``device``.

    Cached images move to the GPU if they fit there. Other images are read ahead by data-loader
    workers. Copies to the GPU do not wait for the GPU.
    """
    if not isinstance(images, CachedImages):
        for pixels, _ in read_batches(images, batches, num_workers):
            yield _copy(torch.from_numpy(pixels), device)
        return
    cached = move_if_small(images.pixels, device)
    for indices in batches:
        yield _copy(cached[_copy(torch.as_tensor(indices), cached.device)], device)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; memory must be pinned for a copy that does not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
