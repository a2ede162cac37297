"""Read encoded images (PNG, JPEG, …) by their index."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..errors import EvaluationError, printable
from .decoding import BadImage, Header, Preprocess, bad_image, check_contents, decode
from .files import Files
from .loading import map_in_processes
from .readers import ImageReader, check_labels

HEADERS_PER_TASK = 256
MAX_EXAMPLES = 3  # broken images named in an error message


class EncodedReader(ImageReader):
    """Encoded images (PNG, JPEG, …), fetched one by one in any order.

    Args:
        kind: kind of the set.
        set_name: name of the set in messages.
        files: the images.
        preprocess: conversion to pixels.
        labels: label of each image, or None.
        rows: index in ``files`` of each image; by default 0, 1, ….
        hash_images: the set is not one file or folder that can be hashed.
    """

    decodes = True
    size: tuple[int, int] | None

    def __init__(
        self,
        kind: str,
        set_name: str,
        files: Files,
        preprocess: Preprocess,
        labels: Any = None,
        rows: np.ndarray | None = None,
        hash_images: bool = False,
    ) -> None:
        self.kind, self.set_name, self.files, self.preprocess = kind, set_name, files, preprocess
        self.rows = np.arange(len(files.names)) if rows is None else rows
        self.names = files.names[self.rows]
        self.hash_images = hash_images
        self.digests = {} if hash_images or kind == "folder" else None
        self.count = len(self.rows)
        if self.count == 0:
            raise EvaluationError(f"{set_name}: holds no images (PNG, JPEG, WebP, …)")
        self.labels = check_labels(labels, self.count, set_name)
        self.size = None if preprocess.size is None else (preprocess.size, preprocess.size)
        self.conversions: Counter[str] = Counter()

    def fetch(self, index: int) -> bytes | Image.Image:
        """Return an encoded image, or a decoded one of Pillow."""
        return self.files.read(int(self.rows[index]))

    def check_headers(self) -> None:
        """Read all headers, count the conversions and find the size of the images.

        Raises:
            EvaluationError: some images cannot be used, or sizes differ. The message counts all
                of them and names a few.
        """

        def header(index: int) -> Header:
            found = self.files.header(int(self.rows[index]))
            self.preprocess.check(found.conversions)
            return found

        found = self._inspect(header)
        if bad := {index: each for index, each in found.items() if isinstance(each, BadImage)}:
            raise EvaluationError(f"{self.set_name}: {self.describe_bad(bad)}")
        if self.preprocess.size is None:
            self.size = self._common_size([(h[1], h[0]) for h in found.values()])  # type: ignore[index]

    def check_contents(self, update: Callable[[int], object] = int) -> dict[int, BadImage]:
        """Read all images, count the conversions, and return the images that cannot be used.

        Args:
            update: called with the number of images that have been checked since the last call.
        """

        def contents(index: int) -> Header:
            data = self.fetch(index)
            if isinstance(data, bytes):
                return check_contents(data, self.preprocess)
            pixels, conversions = decode(data, self.preprocess)
            return Header(pixels.shape[1], pixels.shape[0], conversions)

        found = self._inspect(contents, update)
        return {index: each for index, each in found.items() if isinstance(each, BadImage)}

    def _inspect(
        self, look: Callable[[int], Header], update: Callable[[int], object] = int
    ) -> dict[int, Header | BadImage]:
        """Call ``look`` for all images, in worker processes, and count the conversions."""

        def look_at_some(start: int) -> list[Header | BadImage]:
            found: list[Header | BadImage] = []
            for index in range(start, min(start + HEADERS_PER_TASK, len(self.names))):
                try:
                    found.append(look(index))
                except Exception as error:
                    found.append(bad_image(error))
            return found

        starts = range(0, len(self.names), HEADERS_PER_TASK)
        results: list[Header | BadImage] = []
        for part in map_in_processes(look_at_some, starts, min(16, os.cpu_count() or 1)):
            results += part
            update(len(part))
        self.conversions = Counter(
            conversion for each in results if isinstance(each, Header) for conversion in each[2]
        )
        return dict(enumerate(results))

    def describe_bad(self, bad: dict[int, BadImage]) -> str:
        """Return the number of images that cannot be used, with a few names and reasons."""
        shown = [f"{printable(self.names[i])}: {bad[i]}" for i in list(bad)[:MAX_EXAMPLES]]
        more = ", …" if len(bad) > MAX_EXAMPLES else ""
        return f"{len(bad)} of {self.count} images cannot be used ({', '.join(shown)}{more})"

    def _common_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        counts = Counter(sizes).most_common()
        if len(counts) > 1:
            listed = ", ".join(
                f"{n} of {w}×{h} (as {printable(self.names[sizes.index((h, w))])})"
                for (h, w), n in counts[:4]
            )
            raise EvaluationError(
                f"{self.set_name}: images of different sizes: {listed}; add --resize SIZE, "
                "and --crop to keep the aspect ratio"
            )
        return sizes[0]

    def select(self, kept: np.ndarray) -> None:
        """Keep only some images, by their indices."""
        self.names, self.rows, self.count = self.names[kept], self.rows[kept], len(kept)
        self.labels = None if self.labels is None else self.labels[kept]

    def content_hash(self) -> str | None:
        if not self.hash_images:
            return None
        digest = hashlib.sha256()
        for index in range(len(self.names)):
            known = (self.digests or {}).get(index) or _sha256(self.fetch(index))
            digest.update(bytes.fromhex(known))
        return digest.hexdigest()

    def file_digests(self) -> dict[str, str]:
        if self.kind != "folder" or self.digests is None:
            return {}
        return {self.names[index]: digest for index, digest in self.digests.items()}

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.stack([self.decode(index)[0] for index in range(start, stop)])

    def read_into(self, start: int, stop: int, images: np.ndarray) -> list[str]:
        """Decode into ``images`` and return the SHA-256 of each image if the reader hashes them."""
        for index in range(start, stop):
            images[index - start] = self.decode(index)[0]
        return [] if self.digests is None else [self.digests[i] for i in range(start, stop)]

    def decode(self, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the pixels of an image, uint8 (H, W, 3), and the conversions applied to it.

        Raises:
            EvaluationError: the image cannot be used; the message names it.
        """
        try:
            data = self.fetch(index)
            if self.digests is not None:
                self.digests[index] = _sha256(data)
            return decode(data, self.preprocess)
        except Exception as error:
            name = printable(self.names[index])
            raise EvaluationError(
                f"{self.set_name}: {name}: {bad_image(error)}; replace or remove it"
            ) from error


def _sha256(data: bytes | Image.Image) -> str:
    data = data if isinstance(data, bytes) else data.convert("RGB").tobytes()
    return hashlib.sha256(data).hexdigest()
