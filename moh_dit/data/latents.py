"""Encode a data set once into posterior moments, from which every epoch draws new latents.

A set is indexed by ``(image, flip)``; the trainer decides the order and draws the flips. Small
data sets are encoded into memory when a run starts (``encode_images``). Large data sets are encoded
into shards on disk by ``moh-dit encode`` and opened with ``open_latents``.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import Dataset

from fid_eval.progress import progress_bar

from ..autoencoder import (
    adapter_of,
    autoencoder_identity,
    encode_moments,
    latent_scaling,
    moments_shape,
)
from ..common.errors import UserError
from .images import ImageSet, conversions_of, index_batches, print_conversions, read_batches
from .latent_index import INDEX_FILE, LABELS_FILE, MOMENTS, content_hash, read_index
from .pixels import to_float
from .read_ahead import default_workers, map_ahead
from .stored_arrays import StoredArray, load_array


class LatentSet(Dataset):
    """Moments and labels of N images and of their mirror images, for a ``DataLoader``.

    The moments of an image are mean and log-variance of its posterior, (2C, h, w). An autoencoder
    without a posterior encodes an image to a point, and its moments are this point, (C, h, w).
    """

    class_names: list[str]
    labels: np.ndarray  # int64 (N,)
    flipped: bool  # whether the set contains the mirrored images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """Return the moments, float32 (2C, h, w), and the label of ``(image, flip)``."""
        moments, labels = self.__getitems__([item])
        return moments[0], int(labels[0])

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        """Return a batch: moments float32 (B, 2C, h, w) and labels int64 (B,)."""
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
    vae: ModelMixin,
    *,
    flip: bool = False,
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: bool = True,
) -> LatentMoments:
    """Encode a data set that fits in memory.

    Args:
        images: the images.
        vae: the autoencoder, on the device to use. The result is on the CPU.
        flip: also encode the mirrored images. An autoencoder is not exactly equivariant, so the
            moments of a mirrored image differ from the mirrored moments.
        batch_size: images per forward pass.
        num_workers: data-loader workers that read images; ``None`` for ``default_workers``.
        progress: show a progress bar.

    Raises:
        UserError: the image size is not divisible by the autoencoder's downsampling factor.
    """
    moments = torch.empty(1 + flip, len(images), *moments_shape(vae, images.image_size))
    if num_workers is None:
        num_workers = default_workers(len(images))
    batches = read_batches(images, index_batches(range(len(images)), batch_size), num_workers)
    threads = 1 if vae.device.type == "cpu" else 2  # one queues a batch while the other waits
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(len(images), desc="encoding", unit="img", enabled=progress) as bar,
    ):
        start = 0
        encode = lambda batch: encode_views(vae, batch[0], flip)  # noqa: E731
        for views in map_ahead(pool, encode, batches, 2 * threads):
            stop = start + views.shape[1]
            moments[:, start:stop] = views
            bar.update(stop - start)
            start = stop
    if progress:
        print_conversions("images", [conversions_of(images)])
    return LatentMoments(moments, images.labels, images.class_names)


def encode_views(
    vae: ModelMixin, pixels: np.ndarray, flip: bool, autocast: torch.dtype | None = None
) -> Tensor:
    """Encode images, uint8 (B, S, S, 3), as they are and, with ``flip``, mirrored.

    Args:
        vae, pixels, flip: the autoencoder and its input.
        autocast: see ``encode_moments``.

    Returns:
        Moments on the CPU, float32 (1 or 2, B, 2C, h, w).
    """
    batch = to_float(torch.from_numpy(pixels).to(vae.device))
    views = [batch, batch.flip(-1)] if flip else [batch]
    return torch.stack([encode_moments(vae, view, autocast) for view in views]).cpu()


def open_latents(
    folder: str | Path, vae: ModelMixin | None = None, *, flip: bool = False
) -> "LatentStore":
    """Open latents that ``moh-dit encode`` wrote. Only the index is read.

    Args:
        folder: the latents.
        vae: require that this autoencoder made the latents.
        flip: require the mirrored images.

    Raises:
        UserError: the latents are missing, unfinished or damaged, another autoencoder, another
            version of its adapter or other statistics made them, or they lack the mirrored images.
    """
    store = LatentStore(Path(folder))
    if vae is not None:
        _check_autoencoder(f"latents {folder}", store.index["autoencoder"], vae)
    if flip and not store.flipped:
        raise UserError(
            f"latents {folder} have no mirrored images: encode with --horizontal_flip true, or "
            "train with horizontal_flip false"
        )
    return store


def autoencoder_facts(vae: ModelMixin) -> dict[str, Any]:
    """Return the facts about an autoencoder that the index of its latents stores."""
    return {
        "identity": autoencoder_identity(vae),
        "class": type(vae).__name__,
        "adapter_version": adapter_of(vae).version,
        **latent_scaling(vae).statistics(),
    }


def _check_autoencoder(latents: str, stored: dict[str, Any], vae: ModelMixin) -> None:
    present = autoencoder_facts(vae)
    if present["identity"] != stored["identity"]:
        raise UserError(
            f"{latents} were made with the autoencoder {stored['name']}, whose weights differ from "
            "the given one: set autoencoder to that one, or encode the images again"
        )
    if "class" not in stored:  # format 1, which had one class and compared the weights only
        return
    for name, value in present.items():
        if stored[name] != value:
            raise UserError(
                f"{latents} were encoded with another {name.replace('_', ' ')} of the autoencoder "
                f"({stored[name]}, now {value}): use the former version, or encode the images again"
            )


class LatentStore(LatentSet):
    """Latents in sharded files.

    Attributes:
        index: contents of ``index.json`` in the structure of format 2; see docs/data.md.
        arrays: the arrays of each image by name: ``"moments"``, and others such as features.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = read_index(folder)
        self.class_names: list[str] = self.index["class_names"]
        self.flipped: bool = self.index["flipped"]
        num_images = sum(shard["num_images"] for shard in self.index["shards"])
        self.labels = load_array(folder / LABELS_FILE, (num_images,), np.int64)
        self.arrays = {name: StoredArray(folder, name, self.index) for name in self.index["arrays"]}

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Shape of the moments of every image.

        Raises:
            UserError: images have latents of several shapes.
        """
        shapes = set(self.arrays[MOMENTS].shapes)
        if len(shapes) > 1:
            raise UserError(
                f"latents {self.folder} have {len(shapes)} shapes, but one shape is required"
            )
        return next(iter(shapes), tuple(self.index["arrays"][MOMENTS]["shape"]))

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        moments = torch.from_numpy(self.arrays[MOMENTS].read(items)).float()
        labels = self.labels[[index for index, _ in items]]
        return moments, torch.from_numpy(labels)

    def verify(self) -> None:
        """Read all files and compare them with the hashes in the index.

        Raises:
            UserError: a file has changed; the message names the first one, and the record.
        """
        for array in self.arrays.values():
            array.verify()
        if content_hash(self.index, self.labels) != self.index["content_hash"]:
            raise UserError(
                f"latents {self.folder}: {LABELS_FILE} or {INDEX_FILE} was changed after encoding"
            )
