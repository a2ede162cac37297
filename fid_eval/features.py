"""Extract the features of a set in one pass, divided among ranks and optionally cached.

A set is divided into chunks of ``CHUNK`` images. A chunk belongs to one rank, is one part of the
streamed moments and one file of the cache. Results therefore depend neither on the number of ranks
nor on interruptions.
"""

import contextlib
import heapq
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from .choices import NetworkPrecision
from .distributed import (
    choose_device,
    gather_on_rank0,
    local_world_size,
    rank_and_world_size,
    run_on_all_ranks,
    run_on_rank0,
)
from .errors import EvaluationError, describe_error
from .feature_cache import cache_folder, load_chunk, save_chunk
from .metrics.adm import Gaussian, covariance_factor, gaussian_of, mean_and_covariance
from .metrics.moments import Moments
from .networks.extractors import Extractor, network_precision
from .progress import SECONDS_BETWEEN_LINES, progress_bar
from .sets.image_set import ImageSet
from .sets.loading import CHUNK

LAYERS = ("pool", "spatial")


class Runtime:
    """How the network runs. These settings change results only by rounding.

    Args:
        device: by default the GPU of this rank, else the CPU.
        batch_size: images per batch; by default 128 on a GPU and 64 on a CPU.
        workers: workers that load images; by default one per core of this rank's share, at most 16.
        precision: precision of the network.
        compile: compile the network with torch.compile.
        cache: folder of cached features.
        quiet: show no progress.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        precision: NetworkPrecision = "float32",
        compile: bool = False,
        cache: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.batch_size = batch_size or (128 if self.device.type == "cuda" else 64)
        self.workers = workers or min(16, max(1, (os.cpu_count() or 1) // local_world_size()))
        self.precision, self.compile, self.quiet = precision, compile, quiet
        self.cache = Path(cache).expanduser() if cache else None


@dataclass
class Features:
    """Features of one set, from which the metrics are computed.

    Attributes:
        count: number of images; None if only stored statistics of an unknown number are known.
        rows: features (n, d) by layer, float32 on the CPU, in file order.
        moments: streamed sums by layer.
        stored: mean (d,) and covariance (d, d) by layer, read from a file.
        labels: int64 (n,).
        logits: class logits (n, classes), read from a file.
        seconds: duration of the pass over the images.
        computed: number of images that the network processed; the others were cached.
        notes: what went wrong with the cache.
    """

    count: int | None
    rows: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    stored: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    labels: Tensor | None = None
    logits: Tensor | None = None
    seconds: float = 0.0
    computed: int = 0
    notes: list[str] = field(default_factory=list)

    def gaussian(self, layer: str, device: torch.device) -> Gaussian:
        """Return mean (d,) and covariance factor (d, k) of a layer on ``device``."""
        few = layer in self.rows and len(self.rows[layer]) <= self.rows[layer].shape[1]
        if few and layer not in self.stored:
            return gaussian_of(self.rows[layer], device)
        mean, covariance = self.mean_and_covariance(layer)
        return mean.to(device), covariance_factor(covariance.to(device))

    def mean_and_covariance(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return mean (d,) and covariance (d, d) of a layer in float64."""
        if layer in self.stored:
            return self.stored[layer]
        if layer in self.moments:
            return self.moments[layer].mean_and_covariance()
        return mean_and_covariance(self.rows[layer])


def extract(
    image_set: ImageSet,
    extractor: Extractor,
    keep: set[str],
    moments: set[str],
    runtime: Runtime,
    on_batch: Callable[[int, Tensor], None] | None = None,
) -> Features:
    """Extract the features of all images of a set.

    Args:
        image_set: a set with images.
        extractor: the network.
        keep: layers of which all rows are kept.
        moments: layers of which mean and covariance are streamed. Their rows are kept only while
            there are at most as many rows as dimensions: the covariance is then singular, and the
            rows give the exact distance.
        runtime: how the network runs.
        on_batch: called with the index of the first image and the images, uint8 (n, 3, H, W).

    Returns:
        The features on rank 0, empty features on the other ranks.
    """
    started = time.monotonic()
    if runtime.cache is not None:
        image_set.adopt_hash(run_on_rank0(image_set.content_hash))
    elif rank_and_world_size()[0] == 0:
        image_set.hash_ahead()
    part = run_on_all_ranks(
        lambda: _extract_on_this_rank(image_set, extractor, keep, moments, runtime, on_batch)
    )
    parts = gather_on_rank0(part)
    if parts is None:
        return Features(0)
    return _merge_ranks(parts, keep, moments, image_set.name, time.monotonic() - started)


@contextlib.contextmanager
def read_ahead(image_set: ImageSet, runtime: Runtime) -> Iterator[None]:
    """Decode ``image_set`` in worker processes while the block prepares its extraction.

    The block may build the network or extract another set. Sets that need no decoding, and sets
    whose features may be cached, are not read ahead.
    """
    reader, (rank, size) = image_set.images, rank_and_world_size()
    if reader is None or not reader.decodes or runtime.cache is not None:
        yield
        return
    run_on_all_ranks(
        lambda: reader.read_ahead(
            runtime.batch_size, lambda chunk: chunk % size == rank, runtime.workers, runtime.device
        )
    )
    try:
        yield
    except BaseException:
        reader.cancel_read_ahead()
        raise


@dataclass
class _RankFeatures:
    """Features of the chunks that one rank has extracted."""

    chunks: dict[tuple[int, int], dict[str, Tensor]]  # (owner, chunk) → rows and labels
    moments: dict[str, Moments]
    count: int = 0
    computed: int = 0
    bad_chunks: list[str] = field(default_factory=list)  # reasons why cached chunks are not used
    not_saved: str | None = None  # why chunks cannot be cached


def _extract_on_this_rank(
    image_set: ImageSet,
    extractor: Extractor,
    keep: set[str],
    moments: set[str],
    runtime: Runtime,
    on_batch: Callable[[int, Tensor], None] | None,
) -> _RankFeatures:
    reader = image_set.images
    assert reader is not None
    rank, size = rank_and_world_size()
    owner = rank if reader.is_share else 0
    cache = cache_folder(runtime.cache, image_set, extractor, runtime.precision)
    part = _RankFeatures({}, {})
    wanted = keep | moments

    def is_own(chunk: int) -> bool:
        return reader.is_share or chunk % size == rank

    def add_chunk(chunk: int, values: dict[str, Tensor]) -> None:
        for layer in LAYERS:
            if layer in values and not values[layer].isfinite().all():
                bad = int((~values[layer].isfinite()).any(1).nonzero()[0]) + chunk * CHUNK
                raise EvaluationError(
                    f"{image_set.name}: the features of image {bad} (counted from 0) hold NaN or "
                    f"infinity (extractor {extractor.name}, {runtime.precision})"
                )
        for layer in moments & values.keys():
            if layer not in part.moments:
                part.moments[layer] = Moments(values[layer].shape[1], runtime.device)
            part.moments[layer].add(values[layer])
        part.count += len(values["pool"])
        kept = {
            key: value.cpu()
            for key, value in values.items()
            if key in keep or key == "labels" or (key in moments and part.count <= value.shape[1])
        }
        for layer in moments - keep:  # With more rows than dimensions, the moments are exact.
            if layer in values and layer not in kept:
                for held in part.chunks.values():
                    held.pop(layer, None)
        part.chunks[owner, chunk] = kept

    cached: dict[int, dict[str, Tensor]] = {}
    if cache is not None and on_batch is None:
        for chunk in filter(is_own, range(reader.chunks)):
            count = min(CHUNK, (reader.count or 0) - chunk * CHUNK)
            values, reason = load_chunk(cache, chunk, count, extractor.dimensions)
            if values is not None and wanted <= values.keys():
                if reader.labels is not None:  # Equal images may have other labels in other sets.
                    values["labels"] = torch.from_numpy(reader.labels[chunk * CHUNK :][:count])
                cached[chunk] = values
            if reason is not None:
                part.bad_chunks.append(reason)
    with progress_bar(
        reader.count,
        desc=image_set.name,
        unit=" images",
        enabled=rank == 0 and not runtime.quiet,
        delay=SECONDS_BETWEEN_LINES,
    ) as bar:
        computed = _computed_chunks(
            image_set,
            extractor,
            runtime,
            lambda chunk: is_own(chunk) and chunk not in cached,
            on_batch,
            lambda count: bar.update(count if reader.is_share else count * size),
        )
        # Add chunks in order: rows are dropped in order.
        for chunk, values in heapq.merge(sorted(cached.items()), computed, key=itemgetter(0)):
            add_chunk(chunk, {k: v for k, v in values.items() if k in wanted | {"pool", "labels"}})
            if chunk not in cached:
                part.computed += len(values["pool"])
                if cache is not None and part.not_saved is None:
                    try:
                        save_chunk(cache, chunk, {k: v for k, v in values.items() if k in LAYERS})
                    except (OSError, SafetensorError) as error:  # such as a full disk
                        part.not_saved = describe_error(error)
    part.moments = {layer: value.cpu() for layer, value in part.moments.items()}
    return part


def _computed_chunks(
    image_set: ImageSet,
    extractor: Extractor,
    runtime: Runtime,
    owned: Callable[[int], bool],
    on_batch: Callable[[int, Tensor], None] | None,
    update: Callable[[int], object],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (chunk, {pool, spatial, labels}) for the chunks where ``owned(chunk)`` is true."""
    reader = image_set.images
    assert reader is not None
    batches = reader.batches(runtime.batch_size, owned, runtime.workers, runtime.device)
    if reader.decodes and any(map(owned, range(reader.chunks))):
        extractor.load(runtime.device, runtime.compile)  # Workers decode at the same time.
    for chunk, batches_of_chunk in groupby(batches, lambda batch: batch[0] // CHUNK):
        parts = []
        for start, batch, labels in batches_of_chunk:
            extractor.load(runtime.device, runtime.compile)
            if on_batch is not None:
                on_batch(start, batch)
            with torch.inference_mode(), network_precision(runtime.precision, runtime.device.type):
                images = batch.to(runtime.device, non_blocking=True)
                if runtime.compile:  # Pad a short last batch: another shape would be recompiled.
                    missing = runtime.batch_size - len(batch)
                    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
                values = {key: value[: len(batch)] for key, value in extractor(images).items()}
            if len(values["pool"]) != len(batch):
                raise EvaluationError(
                    f"extractor {extractor.name} returned {len(values['pool'])} features for a "
                    f"batch of {len(batch)} images"
                )
            if labels is not None:
                values["labels"] = labels
            parts.append(values)
            update(len(batch))
        yield chunk, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _merge_ranks(
    parts: list[_RankFeatures], keep: set[str], moments: set[str], name: str, seconds: float
) -> Features:
    count = sum(part.count for part in parts)
    if count < 2:
        raise EvaluationError(f"{name}: holds {count} image; at least 2 are needed")
    chunks = {key: value for part in parts for key, value in part.chunks.items()}
    ordered = [chunks[key] for key in sorted(chunks)]
    features = Features(count, seconds=seconds, computed=sum(part.computed for part in parts))
    if bad := [reason for part in parts for reason in part.bad_chunks]:
        features.notes.append(f"{name}: computed {len(bad)} cached chunks again: {bad[0]}")
    for reason in {part.not_saved for part in parts} - {None}:
        features.notes.append(f"{name}: the cache could not be written: {reason}")
    for layer in keep | moments:
        if all(layer in chunk for chunk in ordered):
            features.rows[layer] = torch.cat([chunk[layer] for chunk in ordered])
    if all("labels" in chunk for chunk in ordered):
        features.labels = torch.cat([chunk["labels"] for chunk in ordered]).long()
    for layer in moments:
        found = [part.moments[layer] for part in parts if layer in part.moments]
        for other in found[1:]:
            found[0].merge(other)
        if found:
            features.moments[layer] = found[0]
    return features
