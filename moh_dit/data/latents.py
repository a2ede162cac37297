"""Latents of a whole data set, encoded once: posterior moments, so each epoch draws anew.

The set is indexed by ``(image, flip)``: whoever trains decides the order and draws the flips.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from ..autoencoder import encode_moments, latent_shape
from .images import ImageSet, read_batches, to_float
from .progress import progress_bar


class LatentSet(Dataset):
    """Posterior moments and labels of N images, flipped or not, for a ``DataLoader``."""

    class_names: list[str]
    labels: np.ndarray  # int64 (N,)
    flipped: bool  # whether the mirrored images are there too

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """Moments (2C, h, w) in float32, mean then log-variance, and the label."""
        moments, labels = self.__getitems__([item])
        return moments[0], int(labels[0])

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        """A whole batch: moments float32 (B, 2C, h, w) and labels int64 (B,)."""
        raise NotImplementedError


class LatentMoments(LatentSet):
    """Moments in memory: ``moments[flip, image]``, float32 (1 or 2, N, 2C, h, w)."""

    def __init__(self, moments: Tensor, labels: np.ndarray, class_names: list[str]):
        self.moments = moments
        self.labels = labels
        self.class_names = class_names
        self.flipped = len(moments) == 2

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        images = torch.tensor([index for index, _ in items])
        flips = torch.tensor([int(flip) for _, flip in items])
        return self.moments[flips, images], torch.from_numpy(self.labels)[images]


def encode_images(
    images: ImageSet,
    vae: AutoencoderKL,
    *,
    flip: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> LatentMoments:
    """Encode a data set that fits in memory; on the device of ``vae``, result on the CPU.

    Args:
        flip: encode the mirrored images too. An autoencoder is not exactly equivariant: the
            moments of a mirrored image are not the mirrored moments.

    Raises:
        UserError: the image size is not divisible by the autoencoder's factor.
    """
    channels, height, width = latent_shape(vae, images.image_size)
    moments = torch.empty(1 + flip, len(images), 2 * channels, height, width)
    batches = index_batches(range(len(images)), batch_size)
    with progress_bar(len(images), desc="encoding", unit="img", enabled=progress) as bar:
        start = 0
        for pixels, _ in read_batches(images, batches, num_workers):
            stop = start + len(pixels)
            moments[:, start:stop] = encode_both(vae, pixels, flip)
            bar.update(len(pixels))
            start = stop
    return LatentMoments(moments, images.labels, images.class_names)


def encode_both(vae: AutoencoderKL, pixels: np.ndarray, flip: bool) -> Tensor:
    """uint8 (B, S, S, 3) → moments on the CPU, (1 or 2, B, 2C, h, w): as they are, and mirrored."""
    batch = to_float(pixels).to(vae.device)
    views = [batch, batch.flip(-1)] if flip else [batch]
    return torch.stack([encode_moments(vae, view).cpu() for view in views])


def index_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut ``indices`` into consecutive batches; the last may be short."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
