"""Encode the images of shards in passes of a fixed size, and write the shards.

Data-loader workers decode images, a pool encodes the passes, and a thread writes shards. All three
work at the same time.
"""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin

from ..autoencoder import moments_shape
from ..common.folder_lock import FolderLock
from .config import EncodeConfig
from .latent_shards import write_file, write_latent_shard
from .latents import encode_views
from .read_ahead import Waiting, map_ahead

IMAGES_PER_PASS = 8  # on a CPU, where several passes run in parallel

Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # uint8 (B, S, S, 3) and int64 (B,)


class _Pass(NamedTuple):
    """Images that are encoded together, and later their moments."""

    shard: str  # file name
    content: np.ndarray  # uint8 (n, S, S, 3), or moments (1 or 2, n, 2C, h, w)
    labels: np.ndarray  # int64 (n,)


def encode_shards(
    config: EncodeConfig,
    plan: dict[str, Any],
    vae: ModelMixin,
    shards: Iterator[tuple[str, Batches]],
    count: Callable[[int], Any],
    lock: FolderLock,
) -> float:
    """Encode the images of all shards and write them in order; a name without images is a marker.

    Args:
        config, plan: settings.
        vae: the autoencoder, on its device.
        shards: file name and batches of each shard.
        count: called with the number of images that were encoded.
        lock: ownership of the output folder, checked before each file.

    Returns:
        Seconds of waiting for decoded images.
    """
    folder, on_cpu = Path(config.output), vae.device.type == "cpu"
    in_bf16 = config.mixed_precision == "bf16"
    if not on_cpu and (in_bf16 or config.tf32) and all(p.dim() < 5 for p in vae.parameters()):
        vae.to(memory_format=torch.channels_last)  # the layout of tensor cores
    if config.compile and hasattr(vae, "encoder"):
        vae.encoder.compile()
    encode = functools.partial(
        _encode_pass,
        vae=vae,
        plan=plan,
        dtype=config.dtype,
        autocast=torch.bfloat16 if in_bf16 else None,
    )
    with (
        _reproducible_threads(vae.device, config.tf32) as (pool, num_threads),
        ThreadPoolExecutor(1) as writer,
    ):
        passes = Waiting(_passes(shards, plan))
        encoded = map_ahead(pool, encode, passes, 2 * num_threads)
        writing: Future[None] | None = None
        for name, group in itertools.groupby(encoded, operator.attrgetter("shard")):
            parts = []
            for each in group:
                parts.append(each)
                count(len(each.labels))
            if writing is not None:
                writing.result()  # at most two shards are in memory
            lock.check()
            writing = writer.submit(_write_shard, folder / name, parts)
        if writing is not None:
            writing.result()
    return passes.seconds


def _passes(shards: Iterator[tuple[str, Batches]], plan: dict[str, Any]) -> Iterator[_Pass]:
    """Cut the batches of each shard into passes. The last pass of a shard has no images."""
    size, side = plan.get("images_per_pass", IMAGES_PER_PASS), plan["image_size"]
    for name, batches in shards:
        for pixels, labels in batches:
            for start in range(0, len(pixels), size):
                part = slice(start, start + size)
                yield _Pass(name, pixels[part], labels[part])
        yield _Pass(name, np.empty((0, side, side, 3), np.uint8), np.empty(0, np.int64))


def _encode_pass(
    images: _Pass,
    *,
    vae: ModelMixin,
    plan: dict[str, Any],
    dtype: str,
    autocast: torch.dtype | None,
) -> _Pass:
    """Encode the images of a pass, padded to the number of images of every pass."""
    count, size = len(images.labels), plan.get("images_per_pass", IMAGES_PER_PASS)
    if count == 0:
        shape = moments_shape(vae, plan["image_size"])
        return images._replace(content=np.empty((1 + plan["flipped"], 0, *shape), dtype))
    padded = np.resize(images.content, (size, *images.content.shape[1:]))  # repeats images
    moments = encode_views(vae, padded, plan["flipped"], autocast)
    return images._replace(content=moments[:, :count].numpy().astype(dtype))


def _write_shard(path: Path, passes: list[_Pass]) -> None:
    if path.suffix == ".npy":
        moments = np.concatenate([each.content for each in passes], axis=1)
        write_latent_shard(path, moments, np.concatenate([each.labels for each in passes]))
    else:
        write_file(path, b"")


@contextlib.contextmanager
def _reproducible_threads(
    device: torch.device, tf32: bool
) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield a thread pool in which a forward pass always gives the same bits, and its size.

    On a CPU, the bits of a convolution depend on its number of threads, and launchers set that
    number according to the number of processes. Each pass therefore uses one thread, and
    several passes run in parallel. On a GPU, one thread queues a pass while the other waits for
    its moments.
    """
    num_threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        with ThreadPoolExecutor(
            num_workers := num_threads if on_cpu else 2,
            initializer=torch.set_num_threads,
            initargs=(1 if on_cpu else num_threads,),
        ) as pool:
            yield pool, num_workers
    finally:
        torch.set_num_threads(num_threads)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
