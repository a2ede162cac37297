"""Open Hugging Face data sets with the package ``datasets``, an optional dependency."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import EvaluationError
from .decoding import Preprocess
from .encoded import EncodedReader
from .image_set import ImageSet
from .readers import IterableReader

URL_PREFIXES = ("hf://", "hf-stream:", "hf:")
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
        label: column with labels, or None for the first column of type ``ClassLabel``.
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


def open_hub(url: str, preprocess: Preprocess, set_name: str) -> ImageSet:
    """Download (or stream) the data set of a URL and open it; see ``parse_hub_url``."""
    source = parse_hub_url(url)
    datasets = import_datasets()
    try:
        dataset = datasets.load_dataset(
            source.name, source.config, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # datasets raises many types for a wrong name, split or network
        raise EvaluationError(f"{url}: the data set cannot be loaded: {error}") from None
    return open_dataset(dataset, preprocess, set_name, source.image, source.label)


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
        preprocess: resizing and cropping of each image.
        set_name: name of the set in messages.
        image: column with images; by default the first of type ``Image``.
        label: column with labels; by default the first of type ``ClassLabel``, if there is one.
    """

    def first_column(kind: str) -> str | None:
        features = (dataset.features or {}).items()
        return next((key for key, value in features if type(value).__name__ == kind), None)

    if isinstance(dataset, dict):
        raise EvaluationError(f"{set_name}: has splits {sorted(dataset)}; choose one of them")
    image, label = image or first_column("Image"), label or first_column("ClassLabel")
    for wanted in (image, label):
        if wanted is not None and wanted not in (dataset.column_names or []):
            raise EvaluationError(f"{set_name}: no column {wanted!r} among {dataset.column_names}")
    if image is None:
        raise EvaluationError(f"{set_name}: no column of images among {dataset.column_names}")
    if not hasattr(dataset, "__len__"):
        pictures = ((row[image], row[label]) if label else row[image] for row in dataset)
        return ImageSet(set_name, "iterable", IterableReader(pictures, set_name, preprocess, False))
    feature = dataset.features[image]
    if hasattr(feature, "decode") and hasattr(dataset, "cast_column"):
        # Encoded bytes can be checked and hashed; decoded images cannot.
        dataset = dataset.cast_column(image, type(feature)(decode=False))

    def fetch(index: int) -> bytes | Image.Image:
        value = dataset[index][image]
        if isinstance(value, dict):
            return value["bytes"] or Path(value["path"]).read_bytes()
        return value

    labels = None if label is None else np.asarray(dataset[label][:])
    names = [f"row {index}" for index in range(len(dataset))]
    reader = EncodedReader("dataset", set_name, names, fetch, preprocess, labels, True)
    return ImageSet(set_name, "dataset", reader)
