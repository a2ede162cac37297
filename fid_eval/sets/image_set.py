"""``ImageSet``: a reference or a set of samples, once it is open.

An ImageSet may hold images (read in pieces by a reader), stored statistics, stored features, or
several of them: an ADM reference file has both images and statistics.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from torch import Tensor

from .hashing import path_hash
from .readers import ImageReader

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass
class ImageSet:
    """A reference or a sample set as opened: what is there, before anything is computed."""

    name: str
    kind: str
    images: ImageReader | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # mu, sigma, mu_s, sigma_s
    features: dict[str, Tensor] = field(default_factory=dict)  # pool, spatial, labels …
    metadata: dict[str, Any] = field(default_factory=dict)  # of a fid-eval reference
    path: Path | None = None
    _hash: "Future[str | None] | None" = field(default=None, repr=False)

    def hash_ahead(self) -> None:
        """Start hashing in the background what is not hashed as it is decoded.

        A file is hashed without the interpreter lock. The thousands of files of a folder would ask
        for it all the time, and the thread that launches kernels asks as often.
        """
        if self._hash is None and (self.images is None or self.images.digests is None):
            self._hash = Future()
            Thread(target=self._compute_hash, args=(self._hash,), daemon=True).start()

    def content_hash(self) -> str | None:
        """sha256 over the content, computed once; None for an iterable."""
        if self._hash is None:
            self._hash = Future()
            self._compute_hash(self._hash)
        return self._hash.result()

    def adopt_hash(self, value: str | None) -> None:
        """Take the hash that another process computed."""
        self._hash = Future()
        self._hash.set_result(value)

    def _compute_hash(self, future: "Future[str | None]") -> None:
        try:
            value = self.images.content_hash() if self.images is not None else None
            if value is None and self.path is not None:
                known = self.images.file_digests() if self.images is not None else {}
                value = path_hash(self.path, known)
            future.set_result(value)
        except Exception as error:
            future.set_exception(error)
