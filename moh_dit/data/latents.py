"""Encode a data set once into posterior moments, from which every epoch draws new latents.

A set is indexed by ``(image, flip)``; the trainer decides the order and draws the flips. Small
data sets are encoded into memory when a run starts (``encode_images``). Large data sets are encoded
into shards on disk by ``moh-dit encode`` and opened with ``open_latents``.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import Dataset

from fid_eval.progress import progress_bar

from ..autoencoder import autoencoder_identity, encode_moments, moments_shape
from ..common.errors import UserError
from .images import ImageSet, conversions_of, index_batches, print_conversions, read_batches
from .latent_shards import FORMAT, INDEX_FILE, LABELS_FILE, PLAN_FILE, content_hash
from .pixels import to_float


class LatentSet(Dataset):
    """Posterior moments and labels of N images and of their mirror images, for a ``DataLoader``."""

    class_names: list[str]
    labels: np.ndarray  # int64 (N,)
    flipped: bool  # whether the set contains the mirrored images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """Return mean and log-variance, float32 (2C, h, w), and the label of ``(image, flip)``."""
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
    num_workers: int = 0,
    progress: bool = True,
) -> LatentMoments:
    """Encode a data set that fits in memory.

    Args:
        images: the images.
        vae: the autoencoder, on the device to use. The result is on the CPU.
        flip: also encode the mirrored images. An autoencoder is not exactly equivariant, so the
            moments of a mirrored image differ from the mirrored moments.
        batch_size: images per forward pass.
        num_workers: data-loader workers that read images.
        progress: show a progress bar.

    Raises:
        UserError: the image size is not divisible by the autoencoder's downsampling factor.
    """
    moments = torch.empty(1 + flip, len(images), *moments_shape(vae, images.image_size))
    batches = index_batches(range(len(images)), batch_size)
    with progress_bar(len(images), desc="encoding", unit="img", enabled=progress) as bar:
        start = 0
        for pixels, _ in read_batches(images, batches, num_workers):
            stop = start + len(pixels)
            moments[:, start:stop] = encode_views(vae, pixels, flip)
            bar.update(len(pixels))
            start = stop
    if progress:
        print_conversions("images", [conversions_of(images)])
    return LatentMoments(moments, images.labels, images.class_names)


def encode_views(vae: ModelMixin, pixels: np.ndarray, flip: bool) -> Tensor:
    """Encode images, uint8 (B, S, S, 3), as they are and, with ``flip``, mirrored.

    Returns:
        Moments on the CPU, float32 (1 or 2, B, 2C, h, w).
    """
    batch = to_float(torch.from_numpy(pixels).to(vae.device))
    views = [batch, batch.flip(-1)] if flip else [batch]
    return torch.stack([encode_moments(vae, view).cpu() for view in views])


def open_latents(
    folder: str | Path, vae: ModelMixin | None = None, *, flip: bool = False
) -> "LatentStore":
    """Open latents that ``moh-dit encode`` wrote. Only the index is read.

    Args:
        folder: the latents.
        vae: require that this autoencoder made the latents.
        flip: require the mirrored images.

    Raises:
        UserError: the latents are missing, unfinished or damaged, another autoencoder made them,
            or they lack the mirrored images.
    """
    store = LatentStore(Path(folder))
    if vae is not None and autoencoder_identity(vae) != store.index["autoencoder"]["identity"]:
        raise UserError(
            f"latents {folder} were made with the autoencoder "
            f"{store.index['autoencoder']['name']}, whose weights differ from the given one: set "
            "autoencoder to that one, or encode the images again"
        )
    if flip and not store.flipped:
        raise UserError(
            f"latents {folder} have no mirrored images: encode with --horizontal_flip true, or "
            "train with horizontal_flip false"
        )
    return store


class LatentStore(LatentSet):
    """Moments in sharded files, read through memory maps with a bounded resident size.

    Attributes:
        index: contents of ``index.json``; see docs/data.md.
    """

    RESIDENT_BYTES = 256 * 2**20  # bytes to read before mapped pages are released

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = _read_index(folder)
        self.class_names: list[str] = self.index["class_names"]
        self.flipped: bool = self.index["flipped"]
        self.image_size: int = self.index["image_size"]
        self.moments_shape: tuple[int, ...] = tuple(self.index["moments_shape"])
        self.dtype = np.dtype(self.index["dtype"])
        counts = [shard["num_images"] for shard in self.index["shards"]]
        self._starts = np.cumsum([0, *counts])  # first image of each shard
        self.labels: np.ndarray = np.load(folder / LABELS_FILE, mmap_mode="r")
        if not len(self.labels) == self._starts[-1] == self.index["num_images"]:
            raise UserError(f"latents {folder}: {LABELS_FILE} and {INDEX_FILE} do not match")
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._bytes_read = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out memory maps, which cannot be pickled; a spawned worker creates its own."""
        return {**self.__dict__, "_maps": {}, "_bytes_read": 0}

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        records = [self._moments_of(index, flip) for index, flip in items]
        for index, flip in items:
            self._prefetch(index, flip)
        moments = np.stack(records, dtype=np.float32)
        labels = self.labels[[index for index, _ in items]]
        # A page fault also maps cached neighbours: up to 64 KiB at both ends of a record.
        self._release_pages(sum(record.nbytes + 2 * 65536 for record in records))
        return torch.from_numpy(moments), torch.from_numpy(labels)

    def verify(self) -> None:
        """Read all files and compare them with the hashes in the index.

        Raises:
            UserError: a file has changed; the message names the first one.
        """
        for number, expected in enumerate(self.index["shards"]):
            data, _ = self._shard(number)
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise UserError(f"latents {self.folder / expected['file']} are damaged")
            self._release_pages(len(data))
        if content_hash(self.index, self.labels) != self.index["content_hash"]:
            raise UserError(
                f"latents {self.folder}: {LABELS_FILE} or {INDEX_FILE} was changed after encoding"
            )

    def _moments_of(self, index: int, flip: bool) -> np.ndarray:
        """Return a view of the mapped moments of one image, (2C, h, w)."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number, position = self._locate(index)
        return self._shard(number)[1][int(flip), position]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the shard that contains an image, and the image's position in it."""
        number = int(self._starts.searchsorted(index, "right")) - 1
        return number, index - int(self._starts[number])

    def _shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        """Return the memory map of a shard, and its moments (1 or 2, n, 2C, h, w)."""
        if number not in self._maps:
            entry = self.index["shards"][number]
            shape = (1 + self.flipped, entry["num_images"], *self.moments_shape)
            path = self.folder / entry["file"]
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                start = file.tell()
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(data) != start + math.prod(shape) * self.dtype.itemsize:
                raise UserError(f"latents {path} are incomplete: the file has {len(data)} bytes")
            _advise(data, "MADV_RANDOM")  # keep the kernel from reading ahead
            moments = np.frombuffer(data, self.dtype, offset=start).reshape(shape)
            self._maps[number] = data, moments
        return self._maps[number]

    def _prefetch(self, index: int, flip: bool) -> None:
        """Start reading the moments of one image, so that a batch loads in parallel."""
        number, position = self._locate(index)
        data, moments = self._shard(number)
        size = moments[0, 0].nbytes
        header = len(data) - moments.nbytes
        start = header + (int(flip) * moments.shape[1] + position) * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(data, "MADV_WILLNEED", page, start + size - page)

    def _release_pages(self, num_bytes: int) -> None:
        """Count the bytes read, and release mapped pages before too many of them are resident."""
        self._bytes_read += num_bytes
        if self._bytes_read >= self.RESIDENT_BYTES:
            for data, _ in self._maps.values():
                _advise(data, "MADV_DONTNEED")
            self._bytes_read = 0


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"latents folder {folder} does not exist")
    if not (folder / INDEX_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise UserError(
                f"latents {folder} are unfinished: run the same moh-dit encode command again with "
                "--resume"
            )
        raise UserError(f"folder {folder} contains no latents: it has no {INDEX_FILE}")
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        if index["format"] != FORMAT:
            raise UserError(
                f"latents {folder} have format {index['format']}; this version reads {FORMAT}"
            )
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / INDEX_FILE} is not an index of latents") from None
    present = set(os.listdir(folder))
    for name in (LABELS_FILE, *(shard["file"] for shard in index["shards"])):
        if name not in present:
            raise UserError(f"latents {folder} are damaged: {name} is missing")
    return index


def _advise(data: mmap.mmap, name: str, *where: int) -> None:
    """Call ``madvise`` if the platform has this advice. It affects only speed and memory."""
    if (advice := getattr(mmap, name, None)) is not None:
        data.madvise(advice, *where)
