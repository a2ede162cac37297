"""Latents of a whole data set, encoded once: posterior moments, so each epoch draws anew.

A set is indexed by ``(image, flip)``: whoever trains decides the order and draws the flips. Small
data is encoded into memory at the start of a run (``encode_images``); large data once, into shards
on disk (``open_latents``), by

    accelerate launch -m moh_dit.data.latents --data my_images --output my_latents
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
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from ..autoencoder import autoencoder_identity, encode_moments, latent_shape
from ..common.errors import UserError
from ..common.progress import progress_bar
from .images import ImageSet, read_batches
from .pixels import to_float

FORMAT = 1
INDEX_FILE = "index.json"
PLAN_FILE = "encoding.json"
LABELS_FILE = "labels.npy"


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


def open_latents(
    folder: str | Path, vae: AutoencoderKL | None = None, *, flip: bool = False
) -> "LatentStore":
    """Open what ``python -m moh_dit.data.latents`` wrote; reads the index and nothing else.

    Args:
        vae: the autoencoder that the run decodes with: the latents must be its own.
        flip: the mirrored images are needed.

    Raises:
        UserError: nothing there, unfinished, damaged, or made by another autoencoder.
    """
    store = LatentStore(Path(folder))
    if vae is not None and autoencoder_identity(vae) != store.index["autoencoder"]["identity"]:
        raise UserError(
            f"latents {folder} were made by another autoencoder "
            f"({store.index['autoencoder']['name']}): its weights differ from the ones given; "
            "encode the images again or give that autoencoder"
        )
    if flip and not store.flipped:
        raise UserError(
            f"latents {folder} have no mirrored images: encode with --flip true, or train without"
        )
    return store


class LatentStore(LatentSet):
    """Moments in sharded files, read through memory maps of which little stays resident.

    ``index`` holds what ``index.json`` says; see docs/data.md.
    """

    RESIDENT_BYTES = 256 * 2**20  # mapped pages touched before they are let go

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
            raise UserError(f"latents {folder}: {LABELS_FILE} does not fit {INDEX_FILE}")
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._touched = 0

    def __getstate__(self) -> dict[str, Any]:  # loader processes that are spawned map anew
        return {**self.__dict__, "_maps": {}, "_touched": 0}

    def __getitems__(self, items: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        records = [self._record(index, flip) for index, flip in items]
        for index, flip in items:
            self._read_ahead(index, flip)
        moments = np.stack(records, dtype=np.float32)
        labels = self.labels[[index for index, _ in items]]
        # A page fault maps its cached neighbours as well, 64 KiB of them at most.
        self._let_go(sum(record.nbytes + 2 * 65536 for record in records))
        return torch.from_numpy(moments), torch.from_numpy(labels)

    def verify(self) -> None:
        """Read everything and compare with the hashes in the index.

        Raises:
            UserError: naming the first file that is not what was written.
        """
        for number, expected in enumerate(self.index["shards"]):
            data, _ = self._shard(number)
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise UserError(f"latents {self.folder / expected['file']} are damaged")
            self._let_go(len(data))
        if content_hash(self.index, self.labels) != self.index["content_hash"]:
            raise UserError(f"latents {self.folder}: labels or index are not what was written")

    def _record(self, index: int, flip: bool) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number, position = self._place(index)
        return self._shard(number)[1][int(flip), position]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard of an image, and its place in it."""
        number = int(self._starts.searchsorted(index, "right")) - 1
        return number, index - int(self._starts[number])

    def _shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        """The mapped file and the moments in it, (1 or 2, n, 2C, h, w)."""
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
                raise UserError(f"latents {path} are cut off: {len(data)} bytes")
            _advise(data, "MADV_RANDOM")  # else the kernel reads far more than is asked for
            moments = np.frombuffer(data, self.dtype, offset=start).reshape(shape)
            self._maps[number] = data, moments
        return self._maps[number]

    def _read_ahead(self, index: int, flip: bool) -> None:
        """Ask for one record without waiting, so that a batch is fetched in parallel."""
        number, position = self._place(index)
        data, moments = self._shard(number)
        size = moments[0, 0].nbytes
        header = len(data) - moments.nbytes
        start = header + (int(flip) * moments.shape[1] + position) * size
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(data, "MADV_WILLNEED", page, start + size - page)

    def _let_go(self, num_bytes: int) -> None:
        """Give touched pages back to the page cache: a map otherwise grows to the whole data."""
        self._touched += num_bytes
        if self._touched >= self.RESIDENT_BYTES:
            for data, _ in self._maps.values():
                _advise(data, "MADV_DONTNEED")
            self._touched = 0


def content_hash(index: dict[str, Any], labels: np.ndarray) -> str:
    """SHA-256 over all moments (by the hashes of their shards), labels, classes and autoencoder."""
    digest = hashlib.sha256()
    shards = [shard["sha256"] for shard in index["shards"]]
    facts = [shards, index["class_names"], index["flipped"], index["autoencoder"]["identity"]]
    digest.update(json.dumps(facts).encode())
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"latents folder {folder} does not exist")
    if not (folder / INDEX_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise UserError(
                f"latents {folder} are not finished: give the command that makes them again, "
                "with --resume"
            )
        raise UserError(f"folder {folder} holds no latents: it has no {INDEX_FILE}")
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        if index["format"] != FORMAT:
            raise UserError(f"latents {folder} have format {index['format']}, not {FORMAT}")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / INDEX_FILE} is not an index of latents") from None
    present = set(os.listdir(folder))
    if missing := [s["file"] for s in index["shards"] if s["file"] not in present]:
        raise UserError(f"latents {folder}: {missing[0]} is missing")
    if LABELS_FILE not in present:
        raise UserError(f"latents {folder}: {LABELS_FILE} is missing")
    return index


def _advise(data: mmap.mmap, name: str, *where: int) -> None:
    """``madvise`` where the platform has this advice; only speed and memory depend on it."""
    if (advice := getattr(mmap, name, None)) is not None:
        data.madvise(advice, *where)


def encode_both(vae: AutoencoderKL, pixels: np.ndarray, flip: bool) -> Tensor:
    """uint8 (B, S, S, 3) → moments on the CPU, (1 or 2, B, 2C, h, w): as they are, and mirrored."""
    batch = to_float(torch.from_numpy(pixels).to(vae.device))
    views = [batch, batch.flip(-1)] if flip else [batch]
    return torch.stack([encode_moments(vae, view).cpu() for view in views])


def index_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut ``indices`` into consecutive batches; the last may be short."""
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
