"""Open references, check that they fit a run, and make them (``fid-eval stats``)."""

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic_write import atomic_path
from .distributed import gather_on_rank0, run_on_rank0
from .errors import EvaluationError
from .features import Features, Runtime, extract
from .foreign_references import open_foreign
from .networks.extractors import Extractor
from .saved_references import REFERENCE_SUFFIX, check_reference_exists, saved_references
from .sets.decoding import AS_IS, POLICY_VERSION, Preprocess
from .sets.image_set import STATISTICS_OF_LAYER, ImageSet
from .sets.loading import CHUNK
from .sets.opening import open_set
from .version import __version__


def open_reference(source: Any, preprocess: Preprocess, extractor: str | None = None) -> ImageSet:
    """Open a reference.

    Args:
        source: any source that ``open_set`` accepts, the name of a saved reference, or a file of
            another program (``foreign_references``).
        preprocess: resizing and cropping of the images.
        extractor: name of the extractor of another program's file that does not tell it.
    """
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if path is not None and path.is_file():
        foreign = open_foreign(path, str(source), extractor)
        if foreign is not None:
            return foreign
    if isinstance(source, str) and not Path(source).expanduser().exists():
        check_reference_exists(source)
        if saved := saved_references().get(source):
            return open_set(str(saved), AS_IS, source)
    opened = open_set(source, preprocess, None if isinstance(source, str | Path) else "reference")
    if "resize" in opened.metadata:  # The images of a fid-eval reference are already preprocessed.
        return open_set(source, AS_IS)
    return opened


def check_reference(
    reference: ImageSet, samples: ImageSet, extractor: Extractor, preprocess: Preprocess
) -> None:
    """Raise unless reference and samples fit each other, the extractor and the preprocessing.

    Both sets are those for this extractor (``ImageSet.for_extractor``).
    """
    for opened in (reference, samples):
        check_identity(opened, extractor)
        check_image_size(opened, extractor)
    stored = reference.metadata.get("resize")
    if stored is not None and str(preprocess) not in ("none", stored):
        raise EvaluationError(
            f"{reference.name}: made with resize {stored!r}, but this run has "
            f"{str(preprocess)!r}; use the same --resize, or make the reference again"
        )
    sets = (reference, samples)
    sizes = [tuple(o.image_size or o.metadata.get("image_size") or ()) for o in sets]
    if all(sizes) and sizes[0] != sizes[1]:
        names = [f"{o.name} is {s[1]}×{s[0]}" for o, s in zip(sets, sizes, strict=True)]
        raise EvaluationError(
            f"image sizes differ: {' and '.join(names)}; give images of one size, or add "
            "--resize SIZE"
        )


def check_identity(opened: ImageSet, extractor: Extractor) -> None:
    """Raise unless stored features or statistics come from ``extractor``."""
    if not (opened.statistics or opened.features):
        return
    stored, known = opened.metadata.get("extractor"), opened.metadata.get("extractor_name")
    if stored is None and known not in (None, extractor.name):
        raise EvaluationError(
            f"{opened.name}: holds features of {known}, but the extractor is {extractor.name}; use "
            f"--extractor {known}"
        )
    # ADM's files hold Inception features and do not say so.
    if stored is None and opened.kind == "npz" and extractor.name != "inception":
        raise EvaluationError(
            f"{opened.name}: holds statistics of Inception features, but the extractor is "
            f"{extractor.name}; make a reference with: fid-eval stats … --extractor "
            f"{extractor.name}"
        )
    if stored is not None and stored != extractor.identity():
        raise EvaluationError(
            f"{opened.name}: made with the extractor {_describe(stored)}, but this run uses "
            f"{_describe(extractor.identity())}; use the same extractor, or make the file again "
            "with several: fid-eval stats … --extractor A,B"
        )
    for layer, (mean, _) in STATISTICS_OF_LAYER.items():
        expected = extractor.dimensions.get(layer)
        found = len(opened.statistics[mean]) if mean in opened.statistics else None
        if layer in opened.features:
            found = opened.features[layer].shape[1]
        if None not in (expected, found) and expected != found:
            raise EvaluationError(
                f"{opened.name}: {layer} features have {found} dimensions, but those of the "
                f"extractor {extractor.name} have {expected}"
            )


def _describe(identity: dict[str, Any]) -> str:
    sha256 = (identity.get("sha256") or "no hash")[:12]
    return f"{identity.get('name')} ({sha256}, {identity.get('preprocessing')})"


def check_image_size(opened: ImageSet, extractor: Extractor) -> None:
    """Raise if the images do not have the only size that the extractor accepts."""
    size = opened.image_size
    if size and extractor.image_size and tuple(size) != tuple(extractor.image_size):
        height, width = extractor.image_size
        raise EvaluationError(
            f"{opened.name}: images have {size[1]}×{size[0]} pixels, but the extractor "
            f"{extractor.name} needs {width}×{height}; add --resize {width}"
        )


class _RandomSubset:
    """Keeps the ``size`` images with the smallest random keys: a uniform sample of a stream."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.heap: list[tuple[float, int, np.ndarray]] = []  # (−key, index, image)

    def add(self, start: int, images: torch.Tensor) -> None:
        """Add the images ``start``, ``start`` + 1, … of the set."""
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
    others: Sequence[Extractor] = (),
) -> Path:
    """Write a reference file in ADM's layout from all images of ``source``.

    The .npz holds mean and covariance of all images (mu, sigma, mu_s, sigma_s), ``images`` random
    images (arr_0) with their labels (arr_1), and ``fid_eval``, a JSON of the image count,
    extractor, preprocessing and content hash.

    Args:
        source: any source with images that ``open_set`` accepts.
        output: .npz file to write; it must not exist.
        extractor: the network.
        runtime: how the network runs.
        preprocess: resizing and cropping of the images.
        images: number of random images to store.
        seed: seed of their choice.
        others: further extractors, whose statistics mu.NAME, sigma.NAME are stored, too.

    Returns:
        The path that was written.

    Raises:
        EvaluationError: ``output`` exists, or ``source`` has no images.
    """
    output = Path(output).expanduser()
    if output.suffix != REFERENCE_SUFFIX:
        raise EvaluationError(f"{output}: the name of a reference file must end in .npz")
    if output.exists():
        raise EvaluationError(f"{output}: exists and is not overwritten; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)  # Fail now rather than after the work.
    opened = open_set(source, preprocess)
    if opened.images is None:
        raise EvaluationError(f"{opened.name}: holds no images to make a reference from")
    for each in (extractor, *others):
        check_image_size(opened, each)
    if others and opened.kind == "iterable":
        raise EvaluationError(f"{opened.name}: can be read once, for one extractor only")
    layers = {"pool", "spatial"} if extractor.has_spatial else {"pool"}
    subset = _RandomSubset(images, seed)
    features = extract(opened, extractor, set(), layers, runtime, subset.add)
    parts = gather_on_rank0(subset.heap)
    more = {each.name: extract(opened, each, set(), {"pool"}, runtime) for each in others}

    def write() -> None:
        kept = sorted((item for part in parts or [] for item in part), key=lambda i: (-i[0], i[1]))
        chosen = sorted(kept[:images], key=lambda item: item[1])
        arrays = _reference_arrays(chosen, features, layers)
        metadata = {
            "count": features.count,
            "extractor": extractor.identity(),
            "others": {each.name: each.identity() for each in others},
            "network_precision": runtime.precision,
            "resize": str(preprocess),
            "decoding": POLICY_VERSION,
            "image_size": list(arrays["arr_0"].shape[1:3]),
            "source": opened.name,
            "source_sha256": opened.content_hash(),
            "fid_eval": __version__,
        }
        for name, found in more.items():
            mean, covariance = found.mean_and_covariance("pool")
            arrays |= {f"mu.{name}": mean.numpy(), f"sigma.{name}": covariance.numpy()}
        arrays["fid_eval"] = np.array(json.dumps(metadata))
        with atomic_path(output) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    run_on_rank0(write)
    return output


def _reference_arrays(
    chosen: list[tuple[float, int, np.ndarray]], features: Features, layers: set[str]
) -> dict[str, np.ndarray]:
    arrays = {"arr_0": np.stack([image for _, _, image in chosen])}
    if features.labels is not None:
        arrays["arr_1"] = features.labels[[index for _, index, _ in chosen]].numpy()
    for layer, names in STATISTICS_OF_LAYER.items():
        if layer in layers:
            for name, value in zip(names, features.mean_and_covariance(layer), strict=True):
                arrays[name] = value.numpy()
    return arrays
