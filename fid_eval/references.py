"""References: opening them, checking that they fit a run, making them (``fid-eval stats``)."""

import heapq
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .distributed import gather, on_first
from .errors import EvaluationError
from .features import Runtime, extract
from .networks.extractors import Extractor
from .sets.decoding import AS_IS, Preprocess
from .sets.image_set import ImageSet
from .sets.loading import CHUNK
from .sets.opening import open_set
from .text import nearest_name

NAME_SUFFIX = ".npz"


def home() -> Path:
    """Where saved references live: $FID_EVAL_HOME, by default ~/.cache/fid_eval."""
    return Path(os.environ.get("FID_EVAL_HOME", "~/.cache/fid_eval")).expanduser()


def saved_references() -> dict[str, Path]:
    """Saved references by name."""
    return {path.stem: path for path in sorted((home() / "references").glob("*" + NAME_SUFFIX))}


def open_reference(source: Any, preprocess: Preprocess) -> ImageSet:
    """Open a reference: anything that ``open_set`` takes, or the name of a saved one."""
    if isinstance(source, str) and not Path(source).expanduser().exists():
        saved = saved_references()
        if source in saved:
            return open_set(str(saved[source]), AS_IS, source)
        if not source.startswith("hf://") and not any(c in source for c in "*{"):
            hint = nearest_name(source, saved) if saved else "none is saved yet"
            raise EvaluationError(
                f"{source}: no such file or folder, and no saved reference of that name ({hint})"
            )
    opened = open_set(source, preprocess, None if isinstance(source, str | Path) else "reference")
    if opened.metadata:  # made by fid-eval: its images are preprocessed already
        return open_set(source, AS_IS)
    return opened


def check_reference(
    reference: ImageSet, samples: ImageSet, extractor: Extractor, preprocess: Preprocess
) -> None:
    """Raise unless both sets and the extractor fit each other."""
    for opened in (reference, samples):
        check_identity(opened, extractor)
        check_image_size(opened, extractor)
    made = reference.metadata.get("resize", "none")
    if reference.metadata and str(preprocess) not in ("none", made):
        raise EvaluationError(
            f"{reference.name}: made with resize {made!r}, but this run asks for "
            f"{str(preprocess)!r}; ask for the same, or make the reference again"
        )
    sizes = [
        tuple(opened.images.size)
        if opened.images is not None and opened.images.size
        else tuple(opened.metadata.get("image_size") or ()) or None
        for opened in (reference, samples)
    ]
    if None not in sizes and sizes[0] != sizes[1]:
        names = [f"{o.name} is {s[1]}×{s[0]}" for o, s in zip((reference, samples), sizes) if s]  # noqa: B905
        raise EvaluationError(
            f"image sizes differ: {' and '.join(names)}; give both at one size, or ask for "
            "--resize SIZE"
        )


def check_identity(opened: ImageSet, extractor: Extractor) -> None:
    """Stored features or statistics must come from this extractor."""
    if not (opened.statistics or opened.features):
        return
    made = opened.metadata.get("extractor")
    if made is None and opened.kind == "npz":  # ADM's files say nothing and mean Inception
        if extractor.name != "inception" and opened.images is None:
            raise EvaluationError(
                f"{opened.name}: holds statistics of Inception features, but the extractor is "
                f"{extractor.name}; make a reference with: fid-eval stats … --extractor "
                f"{extractor.name}"
            )
        if extractor.name != "inception":
            opened.statistics = {}  # the images serve
    if made is not None and made != extractor.identity():
        raise EvaluationError(
            f"{opened.name}: made with the extractor {describe(made)}, this run uses "
            f"{describe(extractor.identity())}; use the same, or make it again"
        )
    for mean, layer in (("mu", "pool"), ("mu_s", "spatial")):
        expected = extractor.dimensions.get(layer)
        found = len(opened.statistics[mean]) if mean in opened.statistics else None
        if layer in opened.features:
            found = opened.features[layer].shape[1]
        if None not in (expected, found) and expected != found:
            raise EvaluationError(
                f"{opened.name}: {layer} features of {found} dimensions, those of the extractor "
                f"{extractor.name} have {expected}"
            )


def describe(identity: dict[str, Any]) -> str:
    sha256 = (identity.get("sha256") or "no hash")[:12]
    return f"{identity.get('name')} ({sha256}, {identity.get('preprocessing')})"


def check_image_size(opened: ImageSet, extractor: Extractor) -> None:
    size = opened.images.size if opened.images is not None else None
    if size and extractor.image_size and tuple(size) != tuple(extractor.image_size):
        height, width = extractor.image_size
        raise EvaluationError(
            f"{opened.name}: images of {size[1]}×{size[0]}, the extractor {extractor.name} takes "
            f"{width}×{height}; ask for --resize {width}"
        )


class _Subset:
    """The ``size`` images with the smallest random keys: a uniform subset of a stream."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.heap: list[tuple[float, int, np.ndarray]] = []  # (−key, index, image)

    def tap(self, start: int, images: torch.Tensor) -> None:
        keys = np.random.default_rng((self.seed, start // CHUNK)).random(CHUNK)
        for offset in range(len(images)):
            key, index = keys[(start + offset) % CHUNK], start + offset
            if len(self.heap) < self.size or -key > self.heap[0][0]:
                image = images[offset].permute(1, 2, 0).cpu().numpy().copy()
                push = heapq.heappush if len(self.heap) < self.size else heapq.heapreplace
                push(self.heap, (-key, index, image))


def save_reference(
    source: Any,
    output: str | Path,
    extractor: Extractor,
    runtime: Runtime,
    preprocess: Preprocess = AS_IS,
    images: int = 10_000,
    seed: int = 0,
) -> Path:
    """Write an ADM-compatible reference of all images of ``source``; refuses to overwrite.

    mu, sigma, mu_s, sigma_s over all of them, arr_0 a random ``images`` of them (arr_1 their
    labels), and ``fid_eval``: JSON with the count, extractor, preprocessing and content hash.
    """
    output = Path(output).expanduser()
    if output.suffix != NAME_SUFFIX:
        raise EvaluationError(f"{output}: a reference file ends in .npz")
    if output.exists():
        raise EvaluationError(f"{output}: exists and is not overwritten; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)  # or find out now that it cannot be
    opened = open_set(source, preprocess)
    if opened.images is None:
        raise EvaluationError(f"{opened.name}: holds no images to make a reference of")
    check_image_size(opened, extractor)
    layers = {"pool", "spatial"} if extractor.has_spatial else {"pool"}
    subset = _Subset(images, seed)
    features = extract(opened, extractor, set(), layers, runtime, subset.tap)
    parts = gather(subset.heap)
    on_first(
        lambda: _write(
            output, opened, extractor, preprocess, features, parts or [], images, runtime.precision
        )
    )
    return output


def _write(
    output: Path,
    opened: ImageSet,
    extractor: Extractor,
    preprocess: Preprocess,
    features: Any,
    parts: list[list],
    images: int,
    precision: str,
) -> None:
    chosen = sorted((item for part in parts for item in part), key=lambda item: (-item[0], item[1]))
    chosen = sorted(chosen[:images], key=lambda item: item[1])
    arrays: dict[str, np.ndarray] = {"arr_0": np.stack([item[2] for item in chosen])}
    if features.labels is not None:
        arrays["arr_1"] = features.labels[[item[1] for item in chosen]].numpy()
    for layer, suffix in (("pool", ""), ("spatial", "_s")):
        if layer == "spatial" and not extractor.has_spatial:
            continue
        mean, covariance = features.mean_and_covariance(layer)
        arrays["mu" + suffix], arrays["sigma" + suffix] = mean.numpy(), covariance.numpy()
    from .version import __version__

    metadata = {
        "count": features.count,
        "extractor": extractor.identity(),
        "network_precision": precision,
        "resize": str(preprocess),
        "image_size": list(arrays["arr_0"].shape[1:3]),
        "source": opened.name,
        "source_sha256": opened.content_hash(),
        "fid_eval": __version__,
    }
    arrays["fid_eval"] = np.array(json.dumps(metadata))
    partial = output.with_suffix(f".partial-{os.getpid()}.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.replace(output)
