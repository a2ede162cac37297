"""From images to features: one pass over a set, shared among processes, kept in a cache.

A set is cut into chunks of ``CHUNK`` images. Each is one process's turn, one part of the streamed
moments and one file of the cache, so neither the number of processes nor a kill changes a result.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .distributed import gather, local_processes, on_first, together, world
from .errors import EvaluationError
from .metrics.adm import covariance_factor, feature_factor, mean_and_covariance
from .metrics.moments import Moments
from .networks.extractors import Extractor, NetworkPrecision, network_precision
from .progress import progress
from .sets.image_set import ImageSet
from .sets.loading import CHUNK

LAYERS = ("pool", "spatial")


@dataclass
class Runtime:
    """How the network is run; none of it changes what is computed beyond rounding."""

    device: torch.device
    batch_size: int = 0  # 0: 64, 128 on a GPU
    workers: int = 0  # that load; 0: one for each core that is this process's share, 16 at most
    precision: NetworkPrecision = "float32"
    compile: bool = False
    cache: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        self.workers = self.workers or min(16, max(1, (os.cpu_count() or 1) // local_processes()))
        self.batch_size = self.batch_size or (128 if self.device.type == "cuda" else 64)


@dataclass
class Features:
    """What the metrics read of one set. Rows are float32 on the CPU, in file order."""

    count: int
    rows: dict[str, Tensor] = field(default_factory=dict)  # layer → (n, d)
    moments: dict[str, Moments] = field(default_factory=dict)  # layer → streamed sums
    stored: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer → (μ, Σ)
    labels: Tensor | None = None
    logits: Tensor | None = None
    seconds: float = 0.0
    computed: int = 0  # images that went through the network, not the cache

    def gaussian(self, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean (d,) and F (d, k) with Σ = F Fᵀ, for the Fréchet distance; on ``device``."""
        few = layer in self.rows and len(self.rows[layer]) <= self.rows[layer].shape[1]
        if few and layer not in self.stored:
            return feature_factor(self.rows[layer].to(device))
        mean, covariance = self.mean_and_covariance(layer)
        return mean.to(device), covariance_factor(covariance.to(device))

    def mean_and_covariance(self, layer: str) -> tuple[Tensor, Tensor]:
        if layer in self.stored:
            return self.stored[layer]
        if layer in self.moments:
            return self.moments[layer].mean_and_covariance()
        return mean_and_covariance(self.rows[layer])


def extract(
    images: ImageSet,
    extractor: Extractor,
    keep: set[str],
    moments: set[str],
    runtime: Runtime,
    tap: Any = None,
) -> Features:
    """Run all images of a set through the extractor; the result is on process 0.

    ``keep``: layers whose rows are kept; ``moments``: layers whose mean and covariance are
    streamed. Rows are kept too as long as there are no more of them than dimensions, where the
    covariance is singular and the rows give the exact answer. ``tap(start, images)`` sees each
    batch (uint8 NCHW, on the CPU or the device).
    """
    assert images.images is not None
    started = time.monotonic()
    if runtime.cache is not None:
        images.adopt_hash(on_first(images.content_hash))
    elif world()[0] == 0:
        images.hash_ahead()
    part = together(lambda: _extract_own(images, extractor, keep, moments, runtime, tap))
    parts = gather(part)
    if parts is None:
        return Features(0)
    return _join(parts, keep, moments, images.name, time.monotonic() - started)


@contextlib.contextmanager
def reading_ahead(images: ImageSet, runtime: Runtime) -> Iterator[None]:
    """Processes decode a set that is due, while the network is built or another set measured."""
    reader, (rank, size) = images.images, world()
    if reader is None or not reader.decodes or runtime.cache is not None:
        yield
        return
    reader.read_ahead(
        runtime.batch_size, lambda chunk: chunk % size == rank, runtime.workers, runtime.device
    )
    try:
        yield
    except BaseException:
        reader.cancel_read_ahead()
        raise


@dataclass
class _Part:
    """One process's chunks."""

    chunks: dict[tuple[int, int], dict[str, Tensor]]  # (share, chunk) → rows, labels
    moments: dict[str, Moments]
    count: int = 0
    computed: int = 0


def _extract_own(
    images: ImageSet,
    extractor: Extractor,
    keep: set[str],
    moments: set[str],
    runtime: Runtime,
    tap: Any,
) -> _Part:
    reader = images.images
    assert reader is not None
    rank, size = world()
    share = rank if reader.is_share else 0
    cache = _cache_folder(images, extractor, runtime)
    part = _Part({}, {})
    wanted = keep | moments

    def mine(chunk: int) -> bool:
        return reader.is_share or chunk % size == rank

    def finish(chunk: int, values: dict[str, Tensor]) -> None:
        for layer in LAYERS:
            if layer in values and not values[layer].isfinite().all():
                bad = int((~values[layer].isfinite()).any(1).nonzero()[0]) + chunk * CHUNK
                raise EvaluationError(
                    f"{images.name}: the features of image {bad} (counted from 0) hold NaN or "
                    f"infinite values (extractor {extractor.name}, {runtime.precision})"
                )
        for layer in moments & values.keys():
            if layer not in part.moments:
                part.moments[layer] = Moments(values[layer].shape[1], runtime.device)
            part.moments[layer].add(values[layer])
        count = len(values["pool"])
        part.count += count
        kept = {
            key: value.cpu()
            for key, value in values.items()
            if key in keep or key == "labels" or (key in moments and part.count <= value.shape[1])
        }
        for layer in moments - keep:  # more rows than dimensions: the moments suffice
            if layer in values and layer not in kept:
                for held in part.chunks.values():
                    held.pop(layer, None)
        part.chunks[share, chunk] = kept

    known: dict[int, Path] = {}
    total = reader.count
    if cache is not None and total is not None:
        known = {
            chunk: path
            for chunk in range(-(-total // CHUNK))
            if mine(chunk) and (path := cache / f"chunk-{chunk:06d}.safetensors").exists()
        }
    with progress(total, images.name, quiet=runtime.quiet or rank > 0) as bar:
        step = 1 if reader.is_share else size
        pending: dict[int, dict[str, Tensor]] = {}
        for chunk, path in known.items():
            assert total is not None
            values = _load_chunk(path, min(CHUNK, total - chunk * CHUNK))
            if values is None or tap is not None or not wanted <= values.keys():
                continue
            pending[chunk] = values
        due = sorted(pending)
        computed = _computed_chunks(
            images,
            extractor,
            runtime,
            lambda c: mine(c) and c not in pending,
            tap,
            lambda n: bar.update(n * step),
        )
        for chunk, values in computed:
            while due and due[0] < chunk:  # in order, so that rows are dropped in order
                finish(due[0], pending[due.pop(0)])
            part.computed += len(values["pool"])
            if cache is not None:
                _save_chunk(cache / f"chunk-{chunk:06d}.safetensors", values)
            finish(chunk, {k: v for k, v in values.items() if k in wanted | {"pool", "labels"}})
        for chunk in due:
            finish(chunk, pending[chunk])
    part.moments = {layer: value.cpu() for layer, value in part.moments.items()}
    return part


def _computed_chunks(
    images: ImageSet, extractor: Extractor, runtime: Runtime, owned: Any, tap: Any, update: Any
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(chunk, {pool, spatial, labels}) for the chunks ``owned``, computed on the device."""
    reader = images.images
    assert reader is not None
    held: list[dict[str, Tensor]] = []
    current = -1

    def joined() -> dict[str, Tensor]:
        return {key: torch.cat([values[key] for values in held]) for key in held[0]}

    batches = reader.batches(runtime.batch_size, owned, runtime.workers, runtime.device)
    if reader.decodes and any(map(owned, range(-(-(reader.count or 0) // CHUNK)))):
        extractor.load(runtime.device, runtime.compile)  # while the first images are decoded
    for start, batch, labels in batches:
        chunk = start // CHUNK
        if held and chunk != current:
            yield current, joined()
            held = []
        current = chunk
        extractor.load(runtime.device, runtime.compile)
        if tap is not None:
            tap(start, batch)
        with (
            torch.inference_mode(),
            network_precision(runtime.precision, runtime.device.type),
        ):
            images_in = batch.to(runtime.device, non_blocking=True)
            if runtime.compile:  # one shape: a short last batch would be compiled anew
                missing = runtime.batch_size - len(batch)
                images_in = F.pad(images_in, (0, 0, 0, 0, 0, 0, 0, missing))
            values = {key: value[: len(batch)] for key, value in extractor(images_in).items()}
        if len(values["pool"]) != len(batch):
            raise EvaluationError(
                f"extractor {extractor.name}: {len(values['pool'])} features for a batch of "
                f"{len(batch)} images"
            )
        if labels is not None:
            values["labels"] = labels
        held.append(values)
        update(len(batch))
    if held:
        yield current, joined()


def _cache_folder(images: ImageSet, extractor: Extractor, runtime: Runtime) -> Path | None:
    reader = images.images
    if runtime.cache is None or reader is None or reader.count is None:
        return None
    content, weights = images.content_hash(), extractor.sha256
    if content is None or weights is None:
        return None
    preprocess = str(getattr(reader, "preprocess", "none")).replace(" ", "-")
    run = f"{extractor.name}-{weights[:16]}-{runtime.precision}"
    folder = runtime.cache / run / f"{content[:32]}-{preprocess}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save_chunk(path: Path, values: dict[str, Tensor]) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file({key: value.cpu().contiguous() for key, value in values.items()}, partial)
    partial.replace(path)  # whole or not there


def _load_chunk(path: Path, count: int) -> dict[str, Tensor] | None:
    try:
        values = load_file(path)
    except (SafetensorError, OSError):
        return None  # damaged: computed again
    return values if len(values.get("pool", ())) == count else None


def _join(
    parts: list[_Part], keep: set[str], moments: set[str], name: str, seconds: float
) -> Features:
    count = sum(part.count for part in parts)
    if count < 2:
        raise EvaluationError(f"{name}: {count} image; a distribution needs at least 2")
    chunks = {key: value for part in parts for key, value in part.chunks.items()}
    ordered = [chunks[key] for key in sorted(chunks)]
    features = Features(count, seconds=seconds, computed=sum(part.computed for part in parts))
    for layer in keep | moments:
        if all(layer in chunk for chunk in ordered):
            features.rows[layer] = torch.cat([chunk[layer] for chunk in ordered])
    if all("labels" in chunk for chunk in ordered):
        features.labels = torch.cat([chunk["labels"] for chunk in ordered]).long()
    for layer in moments:
        for part in parts:
            if layer not in part.moments:
                continue
            if layer in features.moments:
                features.moments[layer].merge(part.moments[layer])
            else:
                features.moments[layer] = part.moments[layer]
    return features
