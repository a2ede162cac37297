"""Open Hugging Face data sets with the package ``datasets``, an optional dependency."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import EvaluationError
from .classes import number_labels
from .decoding import BadImage, Preprocess
from .encoded import EncodedReader
from .files import Files, read_file
from .image_set import ImageSet
from .readers import IterableReader

URL_PREFIXES = ("hf://", "hf-stream:", "hf:")
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "category")  # of columns
URL_OPTIONS = ("split", "streaming", "config", "image", "label")


@dataclass(frozen=True)
class HubUrl:
    """A Hugging Face data set named by a URL.

    Attributes:
        name: repository ``OWNER/NAME``, or a local folder.
        config: configuration of the data set, or None for its default.
        split: a split of the data set.
        streaming: read once from start to end, without storing the data set.
        image: column with images, or None for the first column of type ``Image``.
        label: column with labels, or None to choose one; see ``choose_columns``.
    """

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    image: str | None = None
    label: str | None = None


def is_hub_url(source: Any) -> bool:
    """Return whether ``source`` is a URL that ``parse_hub_url`` accepts."""
    return isinstance(source, str) and source.startswith(URL_PREFIXES)


def parse_hub_url(url: str) -> HubUrl:
    """Parse ``hf://OWNER/NAME[/CONFIG][?split=train&streaming=true&image=COLUMN&label=COLUMN]``.

    A local folder may stand in place of ``OWNER/NAME``. The forms of version 0.1.0 are accepted:
    ``hf://…?config=CONFIG&streaming=1``, ``hf:NAME[/CONFIG][@SPLIT]`` and
    ``hf-stream:NAME[/CONFIG][@SPLIT]``, which streams.

    Raises:
        EvaluationError: unknown option, invalid value of ``streaming``, or no name.
    """
    prefix = next((prefix for prefix in URL_PREFIXES if url.startswith(prefix)), "")
    name, _, query = url.removeprefix(prefix).partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - set(URL_OPTIONS))
    if unknown:
        raise EvaluationError(
            f"{url}: unknown option {unknown[0]!r}; choose from {', '.join(URL_OPTIONS)}"
        )
    if prefix in ("hf:", "hf-stream:"):
        name, _, split = name.partition("@")
        options = {"split": split, **options} if split else options
    streaming = options.pop("streaming", str(prefix == "hf-stream:")).lower()
    if streaming not in ("true", "false", "1", "0"):
        raise EvaluationError(f"{url}: streaming is {streaming!r}; give true or false")
    config = options.pop("config", None)
    if name.count("/") == 2 and not name.startswith(("/", ".", "~")) and not os.path.isdir(name):
        name, _, config = name.rpartition("/")
    if not name:
        raise EvaluationError(f"{url}: no data set is named; give hf://OWNER/NAME")
    return HubUrl(name, config, streaming=streaming in ("true", "1"), **options)


def import_datasets() -> Any:
    """Import the package ``datasets``, or raise an error that tells how to install it."""
    try:
        import datasets
    except ImportError:
        raise EvaluationError(
            "reading Hugging Face data sets needs the package datasets: pip install datasets"
        ) from None
    return datasets


def is_saved_dataset(folder: str | os.PathLike) -> bool:
    """Return whether ``save_to_disk`` of the package ``datasets`` wrote a folder."""
    files = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(folder, f)) for f in each) for each in files)


def load_split(url: str, streaming: bool | None = None) -> tuple[Any, list[str]]:
    """Load the split that a URL names, from the hub or from a local folder.

    Args:
        url: see ``parse_hub_url``.
        streaming: return an ``IterableDataset``; by default what the URL says.

    Returns:
        The split, and for a stream the values that identify it: its files and their versions.

    Raises:
        EvaluationError: the data set cannot be loaded.
    """
    source = parse_hub_url(url)
    streaming = source.streaming if streaming is None else streaming
    datasets = import_datasets()
    try:
        if is_saved_dataset(source.name):
            data = datasets.load_from_disk(source.name)
            data = data[source.split] if isinstance(data, dict) else data
            if not streaming:
                return data, []
            shards = max(1, len(data.cache_files))
            return data.to_iterable_dataset(num_shards=shards), [data._fingerprint]
        if not streaming:
            return datasets.load_dataset(source.name, source.config, split=source.split), []
        builder = datasets.load_dataset_builder(source.name, source.config)
        files = (builder.config.data_files or {}).get(source.split, [])
        versions = [builder.hash, *map(str, files), str(getattr(files, "origin_metadata", ""))]
        return builder.as_streaming_dataset(source.split), [source.split, *versions]
    except Exception as error:  # datasets raises many types for a wrong name, split or network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EvaluationError(f"{url}: the data set cannot be opened: {reason}") from None


def open_hub(url: str, preprocess: Preprocess, set_name: str) -> ImageSet:
    """Download (or stream) the data set of a URL and open it; see ``parse_hub_url``."""
    source = parse_hub_url(url)
    dataset, _ = load_split(url)
    return open_dataset(dataset, preprocess, set_name, source.image, source.label)


def choose_columns(
    dataset: Any, set_name: str, image: str | None = None, label: str | None = None
) -> tuple[str, str | None, list[str]]:
    """Choose the columns with images and labels.

    Args:
        dataset: a ``datasets.Dataset`` or ``datasets.IterableDataset``.
        set_name: name of the set in messages.
        image: column with images; by default the first of type ``Image``.
        label: column with labels; by default the first of type ``ClassLabel``, else a column of
            integers or strings with a usual name (``LABEL_NAMES``), if there is one.

    Returns:
        The columns (None without labels), and a note for each choice among several.

    Raises:
        EvaluationError: a column is missing or has another type.
    """
    features = dict(dataset.features or {})
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    present = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "no known columns"
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    usable = [n for n, f in features.items() if str(getattr(f, "dtype", "")).startswith(
        ("int", "uint", "string", "large_string"))]  # fmt: skip
    if image is not None and image not in images:
        raise EvaluationError(f"{set_name}: no column {image!r} of images; it has {present}")
    if not images:
        raise EvaluationError(f"{set_name}: no column of images (type Image); it has {present}")
    if label is not None and label not in usable:
        raise EvaluationError(f"{set_name}: no column {label!r} of labels; it has {present}")
    labels = labels or [name for name in LABEL_NAMES if name in usable]
    notes = [
        f"images are in the column {images[0]}, not in {', '.join(images[1:])}; choose with ?image="
        for _ in images[1:2]
        if image is None
    ] + [
        f"labels are in the column {labels[0]}, not in {', '.join(labels[1:])}; choose with ?label="
        for _ in labels[1:2]
        if label is None
    ]
    return image or images[0], label or (labels[0] if labels else None), notes


class RowFiles(Files):
    """Images in a column of a ``datasets.Dataset``."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column, self.names = dataset, column, RowNames(len(dataset))

    def read(self, index: int) -> bytes | Image.Image:
        return encoded_image(self.dataset[index][self.column])


def encoded_image(value: Any) -> bytes | Image.Image:
    """Return the image in a row: bytes, or an image of Pillow; raise BadImage without one."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, dict) or not (value["bytes"] or value["path"]):
        raise BadImage("the row has no image")
    if value["bytes"]:
        return value["bytes"]
    if "://" not in value["path"]:
        return read_file(value["path"])
    import fsspec  # a dependency of datasets

    with fsspec.open(value["path"], "rb") as file:
        return file.read()


def keep_encoded(dataset: Any, image: str) -> Any:
    """Return a data set whose images stay encoded, so that they can be checked and hashed."""
    feature = dataset.features[image]
    return dataset.cast_column(image, type(feature)(decode=False))


def open_dataset(
    dataset: Any,
    preprocess: Preprocess,
    set_name: str,
    image: str | None = None,
    label: str | None = None,
) -> ImageSet:
    """Open one split: a ``datasets.Dataset`` or ``datasets.IterableDataset``.

    Args:
        dataset: the split.
        preprocess: conversion of each image to pixels.
        set_name: name of the set in messages.
        image: see ``choose_columns``.
        label: see ``choose_columns``.

    Raises:
        EvaluationError: a missing column, or rows of which only some have labels.
    """
    if isinstance(dataset, dict):
        raise EvaluationError(f"{set_name}: has splits {sorted(dataset)}; choose one of them")
    image, label, notes = choose_columns(dataset, set_name, image, label)
    names = getattr(dataset.features[label], "names", None) if label else None
    if not hasattr(dataset, "__len__"):
        rows = _stream(dataset, image, label, set_name)
        reader = IterableReader(rows, set_name, preprocess, False)
        return ImageSet(set_name, "iterable", reader, class_names=names, notes=notes)
    opened = ImageSet(set_name, "dataset", class_names=names, notes=notes)
    labels = None
    if label is not None and len(dataset):
        values = list(dataset[label])
        if names is not None and set(values) == {-1}:
            opened.missing_labels = "has no labels (all are -1), as many test splits"
            opened.notes.append(f"no labels: it {opened.missing_labels}")
        else:
            where = f"{set_name}, column {label},"
            labels, found = number_labels(values, RowNames(len(values)), None, where)
            opened.class_names = names or found
    opened.images = EncodedReader(
        "dataset",
        set_name,
        RowFiles(keep_encoded(dataset, image), image),
        preprocess,
        labels,
        hash_images=True,
    )
    return opened


def _stream(dataset: Any, image: str, label: str | None, set_name: str) -> Iterator[Any]:
    for index, row in enumerate(dataset):
        if row[image] is None:
            raise EvaluationError(f"{set_name}: row {index} has no image; remove the row")
        if label is not None and not (isinstance(row[label], int) and row[label] >= 0):
            raise EvaluationError(
                f"{set_name}: row {index} has the label {row[label]!r}; a stream needs class "
                "numbers from 0; download the data set, or choose another column with ?label="
            )
        yield row[image] if label is None else (row[image], row[label])


class RowNames(Sequence[str]):
    """Names of rows by their number, without a list of all of them."""

    def __init__(self, rows: int | np.ndarray) -> None:
        self.rows = np.arange(rows) if isinstance(rows, int) else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int → str, else → RowNames
        found = self.rows[index]
        return RowNames(found) if isinstance(found, np.ndarray) else f"row {found}"
