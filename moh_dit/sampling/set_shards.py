"""Store the images of an unfinished set in shards, and find out which images are missing.

    samples.npz.partial/                exists beside the output until the set is finished
      settings.json                     settings that determine the images
      images-START-STOP-DIGEST.npy      uint8 (STOP-START, H, W, 3), written atomically

The digest covers the settings, START and the pixels. A shard that is damaged, renamed or of another
set therefore does not match its name, and counts as missing.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..common.atomic_write import atomic_path, atomic_write, remove
from ..common.errors import UserError

SETTINGS_FILE = "settings.json"
THREADS = 4  # to verify shards
SHARD_NAME = re.compile(r"images-(\d{9,})-(\d{9,})(?:-([0-9a-f]{32}))?\.npy")


class Shard(NamedTuple):
    """A range of images and its file; files of version 0.1.0 have no digest (``None``)."""

    start: int
    stop: int
    file: Path
    digest: str | None


@dataclass
class SetShards:
    """The shards of one unfinished set.

    Attributes:
        folder: folder of the shards.
        identity: everything that determines the images, as JSON reads it.
        num_images: number of images of the set.
        image_shape: (H, W, 3).
    """

    folder: Path
    identity: dict[str, Any]
    num_images: int
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        # A setting that is not set is the same as one that did not exist.
        known = {k: v for k, v in flatten_dict(self.identity).items() if v is not None}
        self._key = json.dumps(known, sort_keys=True).encode()

    def open(self) -> list[Shard]:
        """Start the set, or continue it, and return the intact shards in order.

        Shards that are damaged, overlap others or lie outside the set are removed. Only one process
        may call this method.

        Raises:
            UserError: the set was started with other settings, or its settings cannot be read and
                no shard belongs to the present ones.
        """
        known = self._check_settings()
        shards = list_shards(self.folder)
        intact: list[Shard] = []
        damaged: list[Shard] = []
        with ThreadPoolExecutor(THREADS) as pool:
            readable = list(pool.map(lambda shard: self.read(shard) is not None, shards))
        for shard, is_readable in zip(shards, readable, strict=True):
            follows = shard.start >= (intact[-1].stop if intact else 0)
            is_intact = is_readable and follows and (known or shard.digest)
            (intact if is_intact else damaged).append(shard)
        if damaged and not known and not intact:
            raise UserError(
                f"{self.folder / SETTINGS_FILE} is damaged, and no shard beside it has the present "
                "settings; delete the folder, or give another output"
            )
        for shard in damaged:
            remove(shard.file)
        if damaged:
            print(f"{len(damaged)} shards in {self.folder} are damaged and sampled again")
        content = json.dumps(self.identity, indent=1).encode()
        atomic_write(self.folder / SETTINGS_FILE, content)
        return intact

    def _check_settings(self) -> bool:
        """Return whether the settings of the set can be read.

        Raises:
            UserError: they differ from the present settings.
        """
        path = self.folder / SETTINGS_FILE
        try:
            before = flatten_dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, AttributeError):
            return False
        now = flatten_dict(self.identity)
        differing = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder} was started with other settings: {'; '.join(differing)}; resume "
                "with the same settings, delete the folder, or give another output"
            )
        return True

    def read(self, shard: Shard) -> np.ndarray | None:
        """Return the images of a shard, uint8 (N, H, W, 3), or ``None`` if they are damaged."""
        count = shard.stop - shard.start
        if not 0 < count <= self.num_images - shard.start:
            return None
        try:
            images = np.load(shard.file, mmap_mode="r", allow_pickle=False)
        except Exception:  # of any type, because the file may be damaged in any way
            return None
        if images.dtype != np.uint8 or images.shape != (count, *self.image_shape):
            return None
        if shard.digest not in (None, self._digest(shard.start, images)):
            return None
        return images

    def write(self, start: int, images: np.ndarray) -> None:
        """Write finished images, uint8 (N, H, W, 3), to a shard, atomically."""
        digest = self._digest(start, images)
        name = f"images-{start:09d}-{start + len(images):09d}-{digest}.npy"
        with atomic_path(self.folder / name, parents=False) as temporary:
            np.save(temporary, images)

    def read_all(self) -> Iterator[np.ndarray]:
        """Yield the images of all shards in order.

        Raises:
            UserError: a shard is missing or damaged.
        """
        position = 0
        for shard in list_shards(self.folder):
            images = self.read(shard) if shard.start == position else None
            if images is None:
                break
            yield images
            position = shard.stop
        if position < self.num_images:
            raise UserError(
                f"image {position} in {self.folder} was damaged or removed after it was written; "
                "continue with --resume to sample it again"
            )

    def _digest(self, start: int, images: np.ndarray) -> str:
        digest = hashlib.sha256(self._key + str(start).encode())
        digest.update(np.ascontiguousarray(images).data)
        return digest.hexdigest()[:32]


def list_shards(folder: Path) -> list[Shard]:
    """Return the shards in a folder, in order."""
    found = [(SHARD_NAME.fullmatch(file.name), file) for file in folder.glob("images-*.npy")]
    return sorted(
        Shard(int(match[1]), int(match[2]), file, match[3]) for match, file in found if match
    )


def count_images(folder: Path) -> int:
    """Return how many images of an unfinished set are done."""
    return sum(shard.stop - shard.start for shard in list_shards(folder))


def missing_batches(
    shards: Sequence[Shard], num_images: int, batch_size: int
) -> list[tuple[int, int]]:
    """Return the ranges ``(start, stop)`` of missing images, each at most ``batch_size`` long."""
    batches = []
    position = 0
    for start, stop in [*((shard.start, shard.stop) for shard in shards), (num_images, num_images)]:
        cuts = range(position, start, batch_size)
        batches += [(cut, min(cut + batch_size, start)) for cut in cuts]
        position = stop
    return batches


def flatten_dict(nested: dict[str, Any]) -> dict[str, Any]:
    """Turn nested dictionaries into one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flatten_dict(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return flat
