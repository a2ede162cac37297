"""Represent an opened reference or sample set.

An ImageSet may hold images (read in batches by a reader), stored statistics, stored features, or
several of these: an ADM reference file has both images and statistics.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import printable
from .classes import names_of_numbers, summarize_classes
from .decoding import POLICY_VERSION, describe_conversions
from .hashing import path_hash
from .layouts import Skipped
from .readers import ImageReader

# Names of the mean and covariance of each layer's features in ADM's reference files.
STATISTICS_OF_LAYER = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass
class ImageSet:
    """The contents of a reference or sample set, before anything is computed from them."""

    name: str
    kind: str
    images: ImageReader | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # mu, sigma, mu_s, sigma_s
    features: dict[str, Tensor] = field(default_factory=dict)  # pool, spatial, labels, logits
    metadata: dict[str, Any] = field(default_factory=dict)  # written by fid-eval
    # Statistics of further extractors, by name; metadata["others"] has their identities.
    others: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    path: Path | None = None
    class_names: list[str] | None = None  # by label; None if labels are numbers without names
    in_folders: bool = False  # the labels number class folders
    missing_labels: str | None = None  # reason why expected labels are missing
    skipped: Skipped = field(default_factory=Skipped)
    notes: list[str] = field(default_factory=list)  # what the user should know about the set
    _hash: "Future[str | None] | None" = field(default=None, repr=False)

    @property
    def count(self) -> int | None:
        """Return the number of images or rows of features; None if it is unknown."""
        if "pool" in self.features:
            return len(self.features["pool"])
        return self.images.count if self.images is not None else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Return (height, width) of the images; None if there are none or it is unknown."""
        return self.images.size if self.images is not None else None

    def for_extractor(self, name: str) -> "ImageSet":
        """Return this set with the stored statistics of the extractor called ``name``.

        ADM's files do not name their extractor. Their statistics are those of "inception", and
        other extractors use their images.
        """
        if name in self.others:
            stored = {"extractor": self.metadata["others"][name], "extractor_name": name}
            metadata = {**self.metadata, **stored}
            return replace(self, statistics=self.others[name], metadata=metadata)
        is_adm = self.kind == "npz" and "extractor" not in self.metadata
        if is_adm and self.images is not None and name != "inception":
            return replace(self, statistics={})
        return self

    @property
    def labels(self) -> np.ndarray | None:
        """Return the label of each image, int64 (N,), or None."""
        return self.images.labels if self.images is not None else None

    def names_of_classes(self) -> list[str] | None:
        """Return the class names by label; numbers if there are no names, None without labels."""
        if self.class_names is not None or self.labels is None:
            return self.class_names
        return names_of_numbers(self.labels, self.name)

    def number_classes_as(self, reference: "ImageSet") -> None:
        """Number the classes as ``reference`` does, if both sets name their classes.

        Samples of a few classes then have the labels of these classes in the reference.
        """
        ours, theirs = self.class_names, reference.class_names
        if self.images is None or ours is None or theirs is None or ours == theirs:
            return
        labels = self.labels
        if labels is None and self.in_folders:
            labels = np.zeros(self.count or 0, np.int64)
        if labels is None:
            return
        present = [ours[label] for label in np.unique(labels)]
        if not set(present) <= set(theirs):
            if self.labels is None:  # a folder of images without classes
                return
            missing = printable(next(name for name in present if name not in theirs))
            self.notes.append(
                f"its classes have other names than those of {reference.name} ({missing} is "
                "missing there), so labels are compared by number"
            )
            return
        known = {name: number for number, name in enumerate(theirs)}
        numbers = np.array([known.get(name, -1) for name in ours], np.int64)
        self.images.labels, self.class_names = numbers[labels], theirs

    def facts(self) -> dict[str, Any]:
        """Return the decoding policy, classes, and numbers of conversions and skipped files."""
        names = self.names_of_classes()
        return {
            "policy": POLICY_VERSION,
            "classes": summarize_classes(names) if names else None,
            "conversions": dict(self.images.conversions) if self.images is not None else {},
            "skipped": dict(self.skipped.counts),
        }

    def remarks(self) -> list[str]:
        """Return sentences on conversions, skipped files and peculiarities of the set."""
        conversions = self.images.conversions if self.images is not None else {}
        remarks = [*self.notes, str(self.skipped), describe_conversions(conversions)]
        return [f"{self.name}: {remark}" for remark in remarks if remark]

    def hash_ahead(self) -> None:
        """Hash the set in a background thread, unless its images are hashed as they are decoded.

        Hashing one large file releases the interpreter lock. Hashing the many small files of a
        folder would compete for the lock with the thread that launches kernels.
        """
        if self._hash is None and (self.images is None or self.images.digests is None):
            self._hash = Future()
            Thread(target=self._compute_hash, args=(self._hash,), daemon=True).start()

    def content_hash(self) -> str | None:
        """Return the hash of the contents, computed once; None for an iterable."""
        if self._hash is None:
            self._hash = Future()
            self._compute_hash(self._hash)
        return self._hash.result()

    def adopt_hash(self, value: str | None) -> None:
        """Store the hash that rank 0 computed."""
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
