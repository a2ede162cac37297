"""Hugging Face data sets, from the hub or a folder, as an image set."""

import hashlib
import io
import os
from typing import IO, Any

import numpy as np

from ..errors import UserError
from .sources import ImageFiles, sha256


class HubImages(ImageFiles):
    """A Hugging Face data set, from the hub or a folder: ``hf:NAME[/CONFIG][@SPLIT]``.

    The image column is the first of type ``Image``, the labels the first of type ``ClassLabel``.
    ``SPLIT`` is ``train`` unless given. Needs the ``datasets`` library.
    """

    def __init__(
        self, source: str, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
    ):
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data {source} needs the datasets library: pip install datasets"
            ) from None
        self.source = source
        self.image_size = image_size
        data = _load_hub_split(datasets, source)
        kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        if not images or not labels:
            columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise UserError(
                f"data {source} needs a column of type Image and one of type ClassLabel; "
                f"it has {columns}"
            )
        self.class_names = list(data.features[labels[0]].names)
        self.labels = np.array(data[labels[0]], np.int64)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise UserError(f"data {source} has images without a label, as test splits often do")
        self._column = images[0]
        self._data = data.select_columns(images[:1]).cast_column(
            images[0], datasets.Image(decode=False)
        )
        readable = self._check(skip_unreadable, progress)
        if not readable.all():
            self._data = self._data.select(np.flatnonzero(readable))
            self.labels = self.labels[readable]

    def fingerprint(self) -> str:
        """Over the classes, the labels and every image file."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            with self._open(index) as file:
                digest.update(file.read())
        return sha256(self.class_names, self.labels, digest.digest())

    def _name(self, index: int) -> str:
        return f"{index} of {self.source}"

    def _open(self, index: int) -> IO[bytes]:
        image = self._data[index][self._column]
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        return open(image["path"], "rb")


def _load_hub_split(datasets: Any, source: str) -> Any:
    name, _, split = source.removeprefix("hf:").partition("@")
    try:
        if os.path.isdir(name) and os.path.isfile(os.path.join(name, "dataset_info.json")):
            return datasets.load_from_disk(name)
        if os.path.isdir(name) and os.path.isfile(os.path.join(name, "dataset_dict.json")):
            return datasets.load_from_disk(name)[split or "train"]
        config = None
        if name.count("/") == 2 and not os.path.isdir(name):
            name, _, config = name.rpartition("/")
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # no network, no such name, split or config: all the user's to mend
        reason = " ".join(str(error).split())
        raise UserError(f"data {source} cannot be opened: {reason[:300]}") from None
