"""Read encoded images (PNG, JPEG, …) by their index."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..errors import EvaluationError
from .decoding import (
    EXTENSIONS,
    BadImage,
    Preprocess,
    bad_image,
    check_header,
    check_mode,
    decode,
    to_rgb,
)
from .loading import map_in_processes
from .readers import ImageReader, check_labels

HEADERS_PER_TASK = 256
MAX_EXAMPLES = 3  # broken images named in an error message


class EncodedReader(ImageReader):
    """Encoded images (PNG, JPEG, …), fetched one by one in any order."""

    decodes = True
    size: tuple[int, int]

    def __init__(
        self,
        kind: str,
        set_name: str,
        names: Sequence[str],
        fetch: Callable[[int], bytes | Image.Image],
        preprocess: Preprocess,
        labels: Any = None,
        hash_images: bool = False,
        check: Callable[[int], tuple] | None = None,
    ) -> None:
        self.kind, self.set_name, self.names = kind, set_name, names
        self.fetch, self.preprocess = fetch, preprocess
        self.hash_images = hash_images  # True: the set is not one file or folder to hash
        self.digests = {} if hash_images or kind == "folder" else None
        self.count = len(names)
        if self.count == 0:
            raise EvaluationError(f"{set_name}: holds no images ({', '.join(sorted(EXTENSIONS))})")
        self.labels = check_labels(labels, self.count, set_name)
        self.size = self._inspect(check or self._check)

    def _check(self, index: int) -> tuple:
        """Return (width, height, mode) of an image from its header; raise BadImage."""
        data = self.fetch(index)
        if isinstance(data, bytes):
            return check_header(data[:4096], data[-1024:], len(data), data)
        return data.width, data.height, check_mode(data.mode)

    def _inspect(self, check: Callable[[int], tuple]) -> tuple[int, int]:
        """Return (height, width) of all images from their headers.

        Raises:
            EvaluationError: some images cannot be used, or sizes differ. The message counts all
                of them and names a few.
        """

        def look(start: int) -> list[tuple | BadImage]:
            found: list[tuple | BadImage] = []
            for index in range(start, min(start + HEADERS_PER_TASK, len(self.names))):
                try:
                    found.append(check(index))
                except Exception as error:
                    found.append(bad_image(error))
            return found

        starts = range(0, len(self.names), HEADERS_PER_TASK)
        parts = map_in_processes(look, starts, min(16, os.cpu_count() or 1))
        found = [item for part in parts for item in part]
        bad = [(i, item) for i, item in enumerate(found) if isinstance(item, BadImage)]
        if bad:
            examples = ", ".join(f"{self.names[i]}: {error}" for i, error in bad[:MAX_EXAMPLES])
            more = ", …" if len(bad) > MAX_EXAMPLES else ""
            raise EvaluationError(
                f"{self.set_name}: {len(bad)} of {len(found)} images cannot be used "
                f"({examples}{more})"
            )
        if self.preprocess.size is not None:
            return (self.preprocess.size, self.preprocess.size)
        sizes = [(item[1], item[0]) for item in found if not isinstance(item, BadImage)]
        counts = Counter(sizes).most_common()
        if len(counts) > 1:
            listed = ", ".join(
                f"{n} of {w}×{h} (as {self.names[sizes.index((h, w))]})" for (h, w), n in counts[:4]
            )
            raise EvaluationError(
                f"{self.set_name}: images of different sizes: {listed}; add --resize SIZE, "
                "and --crop to keep the aspect ratio"
            )
        return sizes[0]

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
        images = np.empty((stop - start, *self.size, 3), np.uint8)
        self.read_into(start, stop, images)
        return images

    def read_into(self, start: int, stop: int, images: np.ndarray) -> list[str]:
        """Decode into ``images`` and return the SHA-256 of each image if the reader hashes them."""
        for index in range(start, stop):
            try:
                images[index - start] = self._decode(index)
            except Exception as error:
                raise EvaluationError(
                    f"{self.set_name}: {self.names[index]}: {bad_image(error)}; replace or remove "
                    "it"
                ) from error
        return [] if self.digests is None else [self.digests[i] for i in range(start, stop)]

    def _decode(self, index: int) -> np.ndarray:
        data = self.fetch(index)
        if self.digests is not None:
            self.digests[index] = _sha256(data)
        if isinstance(data, bytes):
            return decode(data, self.preprocess)
        return np.asarray(self.preprocess(to_rgb(data)))


def _sha256(data: bytes | Image.Image) -> str:
    data = data if isinstance(data, bytes) else data.convert("RGB").tobytes()
    return hashlib.sha256(data).hexdigest()
