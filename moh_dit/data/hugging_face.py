"""Hugging Face data sets, from the hub or a folder, as an image set."""

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..common.errors import UserError
from .image_folders import ImageFiles, sha256

PREFIX = "hf:"
STREAM_PREFIX = "hf-stream:"


class HubImages(ImageFiles):
    """A Hugging Face data set, from the hub or a folder: ``hf:NAME[/CONFIG][@SPLIT]``.

    The image column is the first of type ``Image``, the labels the first of type ``ClassLabel``.
    ``SPLIT`` is ``train`` unless given. Needs the ``datasets`` library.
    """

    def __init__(
        self, source: str, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
    ):
        self.source = source
        self.image_size = image_size
        data, _ = open_hub(source.removeprefix(PREFIX), source)
        image, label = choose_columns(data, source)
        self.class_names = list(data.features[label].names)
        self.labels = np.array(data[label], np.int64)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise UserError(f"data {source} has images without a label, as test splits often do")
        self._column = image
        self._data = data.select_columns([image]).cast_column(
            image, datasets_library(source).Image(decode=False)
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


def is_stream(source: str | Path) -> bool:
    """Whether ``source`` names a data set to be read from start to end, once."""
    return str(source).startswith(STREAM_PREFIX)


def datasets_library(source: str) -> Any:
    """The module ``datasets``, or a ``UserError`` that says how to get it."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data {source} needs the datasets library: pip install datasets") from None
    return datasets


def choose_columns(data: Any, source: str) -> tuple[str, str]:
    """The names of the first column of images and the first of labels."""
    kinds = {name: type(kind).__name__ for name, kind in (data.features or {}).items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if not images or not labels:
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none it tells"
        raise UserError(
            f"data {source} needs a column of type Image and one of type ClassLabel; "
            f"it has {columns}"
        )
    return images[0], labels[0]


def open_hub(text: str, source: str, *, streaming: bool = False) -> tuple[Any, list]:
    """One split of ``NAME[/CONFIG][@SPLIT]``: stored first, or streamed.

    Args:
        text: a name on the hub, or a folder.
        source: what the user wrote, for messages.
        streaming: give an ``IterableDataset``, and store nothing.

    Returns:
        The split, and what tells a stream from another (its files and their versions).
    """
    datasets = datasets_library(source)
    name, _, split = text.partition("@")
    try:
        for file in ("dataset_info.json", "dataset_dict.json"):
            if os.path.isfile(os.path.join(name, file)):
                data = datasets.load_from_disk(name)
                data = data[split or "train"] if isinstance(data, dict) else data
                if not streaming:
                    return data, []
                files = max(1, len(data.cache_files))
                return data.to_iterable_dataset(num_shards=files), [data._fingerprint]
        config = None
        if name.count("/") == 2 and not os.path.isdir(name):
            name, _, config = name.rpartition("/")
        split = split or "train"
        if not streaming:
            return datasets.load_dataset(name, config, split=split), []
        builder = datasets.load_dataset_builder(name, config)
        files = (builder.config.data_files or {}).get(split, [])
        origin = [split, builder.hash, *map(str, files), str(getattr(files, "origin_metadata", ""))]
        return builder.as_streaming_dataset(split), origin
    except Exception as error:  # no network, no such name, split or config: all the user's to mend
        reason = " ".join(str(error).split())
        raise UserError(f"data {source} cannot be opened: {reason[:300]}") from None
