"""Read Hugging Face data sets, from the Hub or from a local folder."""

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from fid_eval.errors import EvaluationError
from fid_eval.sets.hugging_face import HubUrl, import_datasets, is_hub_url, parse_hub_url

from ..common.errors import UserError
from .image_folders import ImageFiles, sha256


class HubImages(ImageFiles):
    """A Hugging Face data set: ``hf://OWNER/NAME[/CONFIG][?split=train]``, or ``hf://FOLDER``.

    Images are in the first column of type ``Image``, labels in the first of type ``ClassLabel``,
    unless the URL names other columns (``image=``, ``label=``). Requires the package ``datasets``.
    """

    def __init__(
        self, source: str, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
    ):
        self.source = source
        self.image_size = image_size
        data, _ = load_hub_split(source)
        image, label = choose_columns(data, source)
        self.class_names = list(data.features[label].names)
        self.labels = np.array(data[label], np.int64)
        if len(self.labels) == 0 or self.labels.min() < 0:
            raise UserError(
                f"data {source} contains images without a label, as many test splits do: choose "
                "another split"
            )
        self._column = image
        self._data = data.select_columns([image]).cast_column(
            image, import_datasets().Image(decode=False)
        )
        readable = self._find_readable(skip_unreadable, progress)
        if not readable.all():
            self._data = self._data.select(np.flatnonzero(readable))
            self.labels = self.labels[readable]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the class names, the labels and all image files."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            with self.open_file(index) as file:
                digest.update(file.read())
        return sha256(self.class_names, self.labels, digest.digest())

    def name(self, index: int) -> str:
        return f"{index} of {self.source}"

    def open_file(self, index: int) -> IO[bytes]:
        image = self._data[index][self._column]
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        return open(image["path"], "rb")


def is_hub_source(source: str | Path) -> bool:
    """Return whether ``source`` is the URL of a Hugging Face data set."""
    return is_hub_url(str(source))


def is_stream(source: str | Path) -> bool:
    """Return whether ``source`` is a Hugging Face data set with ``streaming=true``."""
    return is_hub_source(source) and parse_source(source).streaming


def parse_source(source: str | Path) -> HubUrl:
    """Parse the URL of a Hugging Face data set; raise ``UserError`` if it is malformed."""
    try:
        return parse_hub_url(str(source))
    except EvaluationError as error:
        raise UserError(f"data {error}") from None


def choose_columns(data: Any, source: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    url = parse_source(source)
    kinds = {name: type(kind).__name__ for name, kind in (data.features or {}).items()}

    def columns(kind: str, chosen: str | None) -> list[str]:
        return [name for name in kinds if kinds[name] == kind and chosen in (None, name)]

    images, labels = columns("Image", url.image), columns("ClassLabel", url.label)
    if not images or not labels:
        present = ", ".join(f"{name} ({kinds[name]})" for name in kinds) or "no known columns"
        raise UserError(
            f"data {source} needs one column of type Image and one of type ClassLabel; it has "
            f"{present}"
        )
    return images[0], labels[0]


def load_hub_split(source: str, *, streaming: bool = False) -> tuple[Any, list]:
    """Open one split of a Hugging Face data set, of the Hub or of a local folder.

    Args:
        source: the URL.
        streaming: return an ``IterableDataset`` instead of storing the data set on disk.

    Returns:
        The split, and for a stream the values that identify it: its files and their versions.

    Raises:
        UserError: the data set cannot be opened.
    """
    url = parse_source(source)
    try:
        datasets = import_datasets()
        for file in ("dataset_info.json", "dataset_dict.json"):
            if os.path.isfile(os.path.join(url.name, file)):
                data = datasets.load_from_disk(url.name)
                data = data[url.split] if isinstance(data, dict) else data
                if not streaming:
                    return data, []
                num_files = max(1, len(data.cache_files))
                return data.to_iterable_dataset(num_shards=num_files), [data._fingerprint]
        if not streaming:
            return datasets.load_dataset(url.name, url.config, split=url.split), []
        builder = datasets.load_dataset_builder(url.name, url.config)
        files = (builder.config.data_files or {}).get(url.split, [])
        versions = [builder.hash, *map(str, files), str(getattr(files, "origin_metadata", ""))]
        return builder.as_streaming_dataset(url.split), [url.split, *versions]
    except Exception as error:  # datasets raises many types for a wrong name, split or network
        reason = " ".join(str(error).split())
        raise UserError(f"data {source} cannot be opened: {reason[:300]}") from None
