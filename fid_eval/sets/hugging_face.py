"""Hugging Face datasets, where the package ``datasets`` is installed."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import EvaluationError
from .decoding import Preprocess, check_mode
from .encoded import EncodedReader, check_bytes
from .image_set import ImageSet
from .readers import IterableReader

OPTIONS = ("split", "config", "image", "label", "streaming")


def datasets_package() -> Any:
    try:
        import datasets
    except ImportError:
        raise EvaluationError(
            "Hugging Face datasets are read with the package datasets: pip install datasets"
        ) from None
    return datasets


def open_hub(path: str, preprocess: Preprocess, name: str) -> ImageSet:
    """hf://OWNER/NAME?split=train&config=…&image=column&label=column&streaming=1."""
    location, _, query = path.removeprefix("hf://").partition("?")
    options = dict(parse_qsl(query))
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise EvaluationError(f"{path}: unknown {sorted(unknown)}; known: {', '.join(OPTIONS)}")
    datasets = datasets_package()
    try:
        dataset = datasets.load_dataset(
            location,
            options.get("config"),
            split=options.get("split", "train"),
            streaming=options.get("streaming", "0") not in ("0", "false"),
        )
    except Exception as error:  # network, name, split: datasets raises many kinds
        raise EvaluationError(f"{path}: cannot load the dataset: {error}") from None
    return open_dataset(dataset, preprocess, name, options.get("image"), options.get("label"))


def open_dataset(
    dataset: Any,
    preprocess: Preprocess,
    name: str,
    image: str | None = None,
    label: str | None = None,
) -> ImageSet:
    """A Hugging Face ``Dataset`` or ``IterableDataset`` (one split).

    Columns are found by their names or by their types, Image and ClassLabel.
    """

    def column(kind: str) -> str | None:
        features = (dataset.features or {}).items()
        names = [key for key, value in features if type(value).__name__ == kind]
        return names[0] if names else None

    if isinstance(dataset, dict):
        raise EvaluationError(f"{name}: has splits {sorted(dataset)}; choose one")
    image, label = image or column("Image"), label or column("ClassLabel")
    for wanted in (image, label):
        if wanted is not None and wanted not in (dataset.column_names or []):
            raise EvaluationError(f"{name}: no column {wanted!r} among {dataset.column_names}")
    if image is None:
        raise EvaluationError(f"{name}: no column of images among {dataset.column_names}")
    if not hasattr(dataset, "__len__"):
        pictures = ((row[image], row[label]) if label else row[image] for row in dataset)
        return ImageSet(name, "iterable", IterableReader(pictures, name, preprocess, False))
    feature = dataset.features[image]
    if hasattr(feature, "decode") and hasattr(dataset, "cast_column"):
        dataset = dataset.cast_column(image, type(feature)(decode=False))  # bytes: checkable

    def fetch(index: int) -> bytes | Image.Image:
        value = dataset[index][image]
        if isinstance(value, dict):
            return value["bytes"] or Path(value["path"]).read_bytes()
        return value

    def check(index: int) -> tuple:
        value = fetch(index)
        if isinstance(value, bytes):
            return check_bytes(value)
        return value.width, value.height, check_mode(value.mode)

    labels = None if label is None else np.asarray(dataset[label][:])
    names = [f"row {index}" for index in range(len(dataset))]
    reader = EncodedReader("dataset", name, names, fetch, check, preprocess, labels, True)
    return ImageSet(name, "dataset", reader)
