"""Open references that other programs wrote: statistics or features in their own layouts.

EDM2              .pkl   {"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}, "num_images"}
StyleGAN2, 3      .pkl   sums of a FeatureStats object, with or without all features
clean-fid         .npz   mu, sigma, or features in feats (KID), with the mode in the file name
torch-fidelity    .pt    mu, sigma, or a tensor of features, with the extractor in the file name

The files do not hold the hash of the network's weights, which is assumed to be published.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .array_pickles import load_array_pickle, load_torch_arrays
from .errors import EvaluationError, describe_error
from .sets.image_set import ImageSet
from .sets.npz import NpzFile
from .sets.stored_arrays import check_features, check_statistics

Statistics = dict[str, np.ndarray]  # mu (d,), sigma (d, d)
CLEAN_FID = re.compile(r"_(clean|legacy_tensorflow|legacy_pytorch)(_clip_vit_b_32)?_\w+\.npz$")
CLEAN_FID_RESIZING = {
    "clean": "Pillow's bicubic filter",
    "legacy_pytorch": "torch's bilinear interpolation",
    "legacy_tensorflow": None,
}
TORCH_FIDELITY_EXTRACTORS = {  # (extractor, layer) there: name here
    ("inception-v3-compat", "2048"): "inception",
    ("vgg16", "fc2_relu"): "vgg16",
    ("dinov2-vit-l-14", "dinov2"): "dinov2",
    ("clip-vit-b-32", "clip"): "clip-vit-b-32",
    ("clip-vit-l-14", "clip"): "clip-vit-l-14",
    ("clip-vit-l-14-336px", "clip"): "clip",
}
STYLEGAN_EXTRACTORS = {"inception-2015-12-05": "inception", "vgg16": "vgg16"}


@dataclass
class Foreign:
    """The contents of a file.

    Attributes:
        tool: the program that wrote it.
        extractor: name of the extractor here; None if the file does not tell.
        statistics: mean and covariance of the pooled features.
        features: rows of pooled features (n, d).
        others: statistics of further extractors, by name.
        count: number of images; None if the file does not tell.
        resizing: by extractor, how the program resizes images, where this package differs.
    """

    tool: str
    extractor: str | None
    statistics: Statistics = field(default_factory=dict)
    features: Tensor | None = None
    others: dict[str, Statistics] = field(default_factory=dict)
    count: int | None = None
    resizing: dict[str, str] = field(default_factory=dict)


def open_foreign(path: Path, name: str, extractor: str | None = None) -> ImageSet | None:
    """Open a reference of another program, or return None if the file is none.

    Args:
        path: the file.
        name: name of the set in messages and results.
        extractor: the extractor of its features, if the user has named it.

    Raises:
        EvaluationError: the file is damaged, holds code, or does not tell its extractor.
    """
    try:
        readers = (_pickle, _clean_fid, _torch_fidelity)
        found = next((each for read in readers if (each := read(path)) is not None), None)
    except EvaluationError:
        raise
    except Exception as error:  # The contents may be of any type.
        raise EvaluationError(f"{name}: cannot be read: {describe_error(error)}") from None
    if found is None:
        return None
    own = extractor or found.extractor
    if own is None:
        raise EvaluationError(
            f"{name}: the file of {found.tool} does not name the extractor of its features; add "
            "--reference_extractor NAME, such as inception"
        )
    metadata: dict[str, Any] = {"made_by": found.tool, "extractor_name": own}
    metadata |= {"count": found.count} if found.count else {}
    metadata |= {"resizing": found.resizing, "others": dict.fromkeys(found.others)}
    opened = ImageSet(name, found.tool, path=path, metadata=metadata)
    opened.statistics, opened.others = found.statistics, found.others
    for statistics in (opened.statistics, *opened.others.values()):
        check_statistics(statistics, name)
    if found.features is not None:
        opened.features = {"pool": found.features}
        check_features(opened.features, name)
    return opened


def _pickle(path: Path) -> Foreign | None:
    if path.suffix.lower() not in (".pkl", ".pickle"):
        return None
    content = load_array_pickle(path)
    if not isinstance(content, dict):
        raise EvaluationError(f"{path}: holds a {type(content).__name__}, not statistics")
    if "num_items" in content:
        return _stylegan(path, content)
    found = {key: value for key, value in content.items() if isinstance(value, dict)}
    names = {"fid": "inception", "fd_dinov2": "dinov2"}
    if not found.keys() & names.keys():
        raise EvaluationError(
            f"{path}: holds {', '.join(map(str, content)) or 'nothing'}; it needs statistics of "
            "EDM2 (fid, fd_dinov2) or StyleGAN (raw_mean, raw_cov, num_items)"
        )
    statistics = {
        here: _mean_and_covariance(path, found[key]) for key, here in names.items() if key in found
    }
    own = "inception" if "inception" in statistics else "dinov2"
    return Foreign(
        "EDM2", own, statistics.pop(own), others=statistics, count=content.get("num_images"),
        resizing={"dinov2": "an antialiased bicubic filter"},
    )  # fmt: skip


def _stylegan(path: Path, content: dict[str, Any]) -> Foreign:
    """Convert sums Σx and Σxxᵀ, from which StyleGAN's covariance divides by n, to n − 1."""
    count = int(content["num_items"])
    extractor = next((v for k, v in STYLEGAN_EXTRACTORS.items() if k in path.name), None)
    found = Foreign("StyleGAN", extractor, count=count)
    if content.get("raw_mean") is not None and count > 1:
        mean = np.asarray(content["raw_mean"], np.float64) / count
        products = np.asarray(content["raw_cov"], np.float64)
        covariance = (products - count * np.outer(mean, mean)) / (count - 1)
        found.statistics = {"mu": mean, "sigma": (covariance + covariance.T) / 2}
    if content.get("all_features") is not None:
        found.features = torch.from_numpy(np.concatenate(content["all_features"]).astype("f4"))
    if not found.statistics and found.features is None:
        raise EvaluationError(f"{path}: holds neither sums (raw_mean, raw_cov) nor features")
    return found


def _clean_fid(path: Path) -> Foreign | None:
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    match = CLEAN_FID.search(path.name.lower())
    file = NpzFile(path)
    if "arr_0" in file or "fid_eval" in file or not (match or "feats" in file):
        return None
    extractor = None
    if match is not None:
        extractor = "clip-vit-b-32" if match[2] else "inception"
    resizing = CLEAN_FID_RESIZING[match[1]] if match else CLEAN_FID_RESIZING["clean"]
    found = Foreign("clean-fid", extractor)
    found.resizing = {name: resizing for name in filter(None, [extractor]) if resizing}
    if "feats" in file:
        found.features = torch.from_numpy(file["feats"].read()).float()
    else:
        found.statistics = {key: file[key].read() for key in ("mu", "sigma") if key in file}
    return found


def _torch_fidelity(path: Path) -> Foreign | None:
    if path.suffix.lower() not in (".pt", ".pth"):
        return None
    content = load_torch_arrays(path)
    endings = {
        f"-{there}-{kind}-{layer}.pt": here
        for (there, layer), here in TORCH_FIDELITY_EXTRACTORS.items()
        for kind in ("features", "stat-fid")
    }
    extractor = next((here for end, here in endings.items() if path.name.endswith(end)), None)
    found = Foreign("torch-fidelity", extractor)
    if isinstance(content, Tensor):
        found.features = content.float()
    else:
        found.statistics = _mean_and_covariance(path, content)
    return found


def _mean_and_covariance(path: Path, content: Any) -> Statistics:
    if not isinstance(content, dict) or not {"mu", "sigma"} <= content.keys():
        raise EvaluationError(f"{path}: holds no mu and sigma")
    return {key: np.asarray(content[key]) for key in ("mu", "sigma")}
