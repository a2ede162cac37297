"""Open sets stored as arrays: images, features or statistics in .npz or .safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import EvaluationError
from .decoding import Preprocess
from .image_set import STATISTICS, STATISTICS_OF_LAYER, ImageSet
from .npz import NpzFile
from .readers import ArrayReader, check_label_shape

FEATURES = ("pool", "spatial", "labels", "logits")
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def open_npz(path: Path, preprocess: Preprocess, name: str) -> ImageSet:
    """Open an .npz of images, of statistics in ADM's layout, or of both."""
    file = NpzFile(path)
    opened = ImageSet(name, "npz", path=path)
    opened.statistics = {key: file[key].read() for key in STATISTICS if key in file}
    check_statistics(opened.statistics, name)
    if "fid_eval" in file:
        opened.metadata = _metadata(str(file["fid_eval"].read()), name)
        for other in opened.metadata.get("others", {}):
            keys = {key: f"{key}.{other}" for key in STATISTICS if f"{key}.{other}" in file}
            opened.others[other] = {key: file[stored].read() for key, stored in keys.items()}
            check_statistics(opened.others[other], f"{name}: {other}")
    if "arr_0" in file:
        labels = None
        if "arr_1" in file:
            member = file["arr_1"]
            if member.dtype.kind not in "iu":
                raise EvaluationError(f"{name}: arr_1 is {member.dtype}; labels must be integers")
            check_label_shape(member.shape, file["arr_0"].shape[:1], name)
            labels = member.read()
        opened.images = ArrayReader(file["arr_0"], name, preprocess, labels)
    if opened.images is None and not opened.statistics:
        raise EvaluationError(
            f"{name}: holds {sorted(file) or 'nothing'}; it needs images arr_0 (uint8) or "
            "statistics mu, sigma"
        )
    return opened


def check_statistics(statistics: dict[str, np.ndarray], name: str) -> None:
    """Convert statistics to float64 in the byte order of this machine, and check them.

    Raises:
        EvaluationError: a mean (d,) or its covariance (d, d) is missing, has another shape or type,
            or holds NaN or infinity; or the matrix is not a covariance.
    """
    for key, value in statistics.items():
        if value.dtype.kind not in "fiu":
            raise EvaluationError(f"{name}: {key} has dtype {value.dtype}; real numbers are needed")
        statistics[key] = np.ascontiguousarray(value, np.float64)
    for mean, covariance in STATISTICS_OF_LAYER.values():
        if (mean in statistics) != (covariance in statistics):
            raise EvaluationError(f"{name}: has only one of {mean} and {covariance}")
        if mean not in statistics:
            continue
        shape = np.shape(statistics[mean]), np.shape(statistics[covariance])
        if len(shape[0]) != 1 or shape[1] != shape[0] * 2 or shape[0] == (0,):
            raise EvaluationError(
                f"{name}: {mean} has shape {shape[0]} and {covariance} has shape {shape[1]}; "
                "(d,) and (d, d) are needed"
            )
        if not all(np.isfinite(statistics[key]).all() for key in (mean, covariance)):
            raise EvaluationError(f"{name}: {mean} or {covariance} holds NaN or infinite values")
        if reason := _not_a_covariance(statistics[covariance]):
            raise EvaluationError(f"{name}: {covariance} is not a covariance: {reason}")


def _not_a_covariance(matrix: np.ndarray) -> str | None:
    """Return why a matrix (d, d) cannot be a covariance; None if it can, up to rounding."""
    variances = matrix.diagonal()
    if variances.min() < 0:
        return f"the variance in row {variances.argmin()} is negative"
    largest = max(variances.max(), np.finfo(np.float64).tiny * 1e3)
    if np.abs(matrix - matrix.T).max() > 1e-3 * largest:
        return "it is not symmetric"
    try:
        # Rounding a singular covariance of Inception to float16 gives eigenvalues of -6e-4.
        np.linalg.cholesky(matrix + 1e-2 * largest * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return "it has negative eigenvalues"
    return None


def open_safetensors(path: Path, name: str) -> ImageSet:
    """Open a .safetensors file of features or of statistics."""
    if path.stat().st_size > psutil.virtual_memory().available:
        raise EvaluationError(f"{name}: {path.stat().st_size >> 30} GiB do not fit into memory")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if key in (*STATISTICS, *FEATURES)}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise EvaluationError(f"{name}: not a complete .safetensors file ({error})") from None
    opened = ImageSet(name, "safetensors", path=path)
    opened.statistics = {
        key: (tensors[key].double() if tensors[key].is_floating_point() else tensors[key]).numpy()
        for key in STATISTICS
        if key in tensors
    }
    check_statistics(opened.statistics, name)
    opened.features = {key: tensors[key] for key in FEATURES if key in tensors}
    if not opened.statistics and "pool" not in opened.features:
        raise EvaluationError(
            f"{name}: holds {sorted(keys) or 'nothing'}; it needs features pool (N, d), or "
            "statistics mu, sigma"
        )
    if opened.features:
        check_features(opened.features, name)
    opened.metadata = _metadata(metadata.get("fid_eval", "{}"), name)
    return opened


def check_features(features: dict[str, Tensor], name: str) -> None:
    """Raise unless ``pool`` exists and all features have the right type, shape and values."""
    if "pool" not in features:
        raise EvaluationError(f"{name}: holds {sorted(features)} without pool (N, d)")
    for key, value in features.items():
        is_labels = key == "labels"
        is_number = value.is_floating_point() or (is_labels and value.dtype in INTEGERS)
        if not is_number or value.ndim != (1 if is_labels else 2) or 0 in value.shape:
            needed = "integers (N,)" if is_labels else "floating point (N, d)"
            raise EvaluationError(
                f"{name}: {key} has dtype {value.dtype} and shape {tuple(value.shape)}; {needed} "
                "is needed"
            )
        if len(value) != len(features["pool"]):
            raise EvaluationError(f"{name}: {key} and pool have different numbers of rows")
        if value.is_floating_point():
            value = value.float()  # 8-bit types do not support isfinite
            bad = (~value.isfinite()).reshape(len(value), -1).any(1)
            if bad.any():
                raise EvaluationError(
                    f"{name}: {int(bad.sum())} of {len(value)} rows of {key} hold NaN or infinite "
                    f"values (first: row {int(bad.nonzero()[0])})"
                )
            if is_labels and (value % 1).any():
                raise EvaluationError(f"{name}: labels must be integers")


def _metadata(text: str, name: str) -> dict[str, Any]:
    """Parse the settings that fid-eval stores in its files."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise EvaluationError(f"{name}: its settings (fid_eval) are damaged; make the file again")
    return metadata
