"""Sets stored as arrays: .npz of images or statistics, .safetensors of features or statistics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import EvaluationError
from .decoding import Preprocess
from .image_set import STATISTICS, ImageSet
from .npz import NpzFile
from .readers import ArrayReader

FEATURES = ("pool", "spatial", "labels", "logits")


def open_npz(path: Path, preprocess: Preprocess, name: str) -> ImageSet:
    file = NpzFile(path)
    opened = ImageSet(name, "npz", path=path)
    opened.statistics = {key: file[key].read() for key in STATISTICS if key in file}
    check_statistics(opened.statistics, name)
    if "fid_eval" in file:
        opened.metadata = json.loads(str(file["fid_eval"].read()))
    if "arr_0" in file:
        labels = None
        if "arr_1" in file:
            labels = file["arr_1"].read()
            if labels.dtype.kind not in "iu":
                raise EvaluationError(f"{name}: arr_1 is {labels.dtype}, labels are integers")
        opened.images = ArrayReader(file["arr_0"], name, preprocess, labels)
    if opened.images is None and not opened.statistics:
        raise EvaluationError(
            f"{name}: holds {sorted(file.members) or 'nothing'}; needed are images arr_0 (uint8) "
            "or statistics mu, sigma"
        )
    return opened


def check_statistics(statistics: dict[str, Any], name: str) -> None:
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in statistics) != (covariance in statistics):
            raise EvaluationError(f"{name}: has only one of {mean} and {covariance}")
        if mean in statistics:
            shape = np.shape(statistics[mean]), np.shape(statistics[covariance])
            if len(shape[0]) != 1 or shape[1] != shape[0] * 2:
                raise EvaluationError(f"{name}: {mean} {shape[0]}, {covariance} {shape[1]}")
            if not all(np.isfinite(statistics[key]).all() for key in (mean, covariance)):
                raise EvaluationError(f"{name}: {mean} or {covariance} holds NaN or infinity")


def open_safetensors(path: Path, name: str) -> ImageSet:
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
            f"{name}: holds {sorted(keys) or 'nothing'}; needed are features pool (N, d), with "
            "spatial, labels and logits if there are any, or statistics mu, sigma"
        )
    for key, value in opened.features.items():
        if len(value) != len(opened.features["pool"]):
            raise EvaluationError(f"{name}: {key} and pool have different numbers of rows")
        if value.is_floating_point():
            bad = (~value.isfinite()).reshape(len(value), -1).any(1)
            if bad.any():
                raise EvaluationError(
                    f"{name}: {int(bad.sum())} of {len(value)} rows of {key} hold NaN or infinity "
                    f"(first: row {int(bad.nonzero()[0])})"
                )
    if "fid_eval" in metadata:
        opened.metadata = json.loads(metadata["fid_eval"])
    return opened
