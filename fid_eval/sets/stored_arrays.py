"""Open sets stored as arrays: images, features or statistics in .npz or .safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import EvaluationError
from .decoding import Preprocess
from .image_set import STATISTICS, STATISTICS_OF_LAYER, ImageSet
from .npz import NpzFile
from .readers import ArrayReader

FEATURES = ("pool", "spatial", "labels", "logits")


def open_npz(path: Path, preprocess: Preprocess, name: str) -> ImageSet:
    """Open an .npz of images, of statistics in ADM's layout, or of both."""
    file = NpzFile(path)
    opened = ImageSet(name, "npz", path=path)
    opened.statistics = {key: file[key].read() for key in STATISTICS if key in file}
    check_statistics(opened.statistics, name)
    if "fid_eval" in file:
        opened.metadata = json.loads(str(file["fid_eval"].read()))
    if "arr_0" in file:
        labels = file["arr_1"].read() if "arr_1" in file else None
        if labels is not None and labels.dtype.kind not in "iu":
            raise EvaluationError(f"{name}: arr_1 is {labels.dtype}; labels must be integers")
        opened.images = ArrayReader(file["arr_0"], name, preprocess, labels)
    if opened.images is None and not opened.statistics:
        raise EvaluationError(
            f"{name}: holds {sorted(file) or 'nothing'}; it needs images arr_0 (uint8) or "
            "statistics mu, sigma"
        )
    return opened


def check_statistics(statistics: dict[str, Any], name: str) -> None:
    """Raise unless each mean (d,) has a covariance (d, d) and all values are finite."""
    for mean, covariance in STATISTICS_OF_LAYER.values():
        if (mean in statistics) != (covariance in statistics):
            raise EvaluationError(f"{name}: has only one of {mean} and {covariance}")
        if mean not in statistics:
            continue
        shape = np.shape(statistics[mean]), np.shape(statistics[covariance])
        if len(shape[0]) != 1 or shape[1] != shape[0] * 2:
            raise EvaluationError(
                f"{name}: {mean} has shape {shape[0]} and {covariance} has shape {shape[1]}; "
                "(d,) and (d, d) are needed"
            )
        if not all(np.isfinite(statistics[key]).all() for key in (mean, covariance)):
            raise EvaluationError(f"{name}: {mean} or {covariance} holds NaN or infinite values")


def open_safetensors(path: Path, name: str) -> ImageSet:
    """Open a .safetensors file of features or of statistics."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if key in (*STATISTICS, *FEATURES)}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise EvaluationError(f"{name}: not a complete .safetensors file ({error})") from None
    opened = ImageSet(name, "safetensors", path=path)
    opened.statistics = {key: tensors[key].numpy() for key in STATISTICS if key in tensors}
    check_statistics(opened.statistics, name)
    opened.features = {key: tensors[key] for key in FEATURES if key in tensors}
    if not opened.statistics and "pool" not in opened.features:
        raise EvaluationError(
            f"{name}: holds {sorted(keys) or 'nothing'}; it needs features pool (N, d), or "
            "statistics mu, sigma"
        )
    for key, value in opened.features.items():
        if len(value) != len(opened.features["pool"]):
            raise EvaluationError(f"{name}: {key} and pool have different numbers of rows")
        if value.is_floating_point():
            bad = (~value.isfinite()).reshape(len(value), -1).any(1)
            if bad.any():
                raise EvaluationError(
                    f"{name}: {int(bad.sum())} of {len(value)} rows of {key} hold NaN or infinite "
                    f"values (first: row {int(bad.nonzero()[0])})"
                )
    opened.metadata = json.loads(metadata.get("fid_eval", "{}"))
    return opened
