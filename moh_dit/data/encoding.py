"""Encode a data set into sharded latents with any number of processes, resumable and reproducible.

Each of n processes encodes every n-th missing shard of an image set, or every n-th file of a stream
(``hub_stream``). ``latent_shards`` writes the files. The network always encodes ``IMAGES_PER_PASS``
images together, grouped independently of the number of processes, batch size and threads. The
latents are therefore the same, bit for bit.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import ModelMixin

from fid_eval.progress import progress_bar

from ..autoencoder import autoencoder_identity, latent_scaling, load_autoencoder, moments_shape
from ..common.disk_space import require_disk_space
from ..common.distributed import own_folder, run_on_main_process
from ..common.errors import UserError
from ..common.folder_lock import FolderLock
from ..common.paths import choose_autoencoder
from .config import EncodeConfig
from .hub_stream import HubStream
from .images import (
    ImageSet,
    conversions_of,
    index_batches,
    is_stream,
    open_images,
    print_conversions,
    read_batches,
)
from .latent_shards import FORMAT, SHARD_PREFIX, prepare_folder, write_index, write_latent_shard
from .latents import encode_views

IMAGES_PER_PASS = 8
MAX_IMAGES_PER_SHARD = 4096
MAX_BYTES_PER_SHARD = 256 * 2**20
TIMEOUT = timedelta(days=1)  # processes wait while rank 0 checks the data, and for the last shard

Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # uint8 (B, S, S, 3) and int64 (B,)


def encode_data(config: EncodeConfig, images: ImageSet | None = None) -> None:
    """Encode a data set into ``config.output``. Every process of a launch calls this function.

    Args:
        config: settings.
        images: the opened ``config.data``, if the caller has opened it already.

    Raises:
        UserError: bad data, an output that exists or is in use, or resuming with other settings or
            data.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    vae = load_autoencoder(choose_autoencoder(config.autoencoder, config.data))
    state.wait_for_everyone()  # every process has checked the output before rank 0 creates it
    with own_folder(state, Path(config.output)) as lock:
        _encode_data(config, images, vae, state, lock)


def _encode_data(
    config: EncodeConfig,
    images: ImageSet | None,
    vae: ModelMixin,
    state: PartialState,
    lock: FolderLock,
) -> None:
    source, plan = run_on_main_process(state, lambda: _prepare(config, vae, images))
    folder = Path(config.output)
    every_nth = slice(state.process_index, None, state.num_processes)
    batch_size = _whole_passes(config.batch_size)
    shards: Iterator[tuple[str, Batches]]
    if isinstance(source, HubStream):
        total = source.num_images
        threads = max(1, config.num_workers)
        shards = source.parts(folder, plan["images_per_shard"], batch_size, threads, every_nth)
    else:
        present = set(os.listdir(folder))
        missing = [i for i in range(_num_shards(plan)) if _shard_name(plan, i) not in present]
        total = sum(len(_image_range(plan, shard)) for shard in missing[every_nth])
        shards = _read_shards(source, plan, missing[every_nth], batch_size, config.num_workers)
    state.wait_for_everyone()  # every process has listed the existing shards
    vae = vae.to(state.device)
    with (
        _reproducible_threads(state.device, config.tf32) as pool,
        progress_bar(
            total,
            desc=f"encoding, 1 of {n}" if (n := state.num_processes) > 1 else "encoding",
            unit="img",
            enabled=state.is_main_process,
        ) as bar,
    ):
        for name, batches in shards:
            parts: list[np.ndarray] = []
            labels: list[np.ndarray] = [np.empty(0, np.int64)]
            for pixels, batch_labels in batches:
                parts += _encode(pixels, vae, plan, pool)
                labels.append(batch_labels)
                bar.update(len(batch_labels))
            no_images = np.empty((1 + plan["flipped"], 0, *plan["moments_shape"]), plan["dtype"])
            moments = np.concatenate([no_images, *parts], axis=1, dtype=plan["dtype"])
            lock.check()
            write_latent_shard(folder / name, moments, np.concatenate(labels))
    conversions = gather_object([conversions_of(source)])
    state.wait_for_everyone()
    if state.is_main_process:
        print_conversions(config.data, conversions)
        if isinstance(source, HubStream):
            names = source.finish(folder)
        else:
            names = [_shard_name(plan, shard) for shard in range(_num_shards(plan))]
        count = write_index(folder, plan, names)
        print(f"wrote {folder}: {count} images of {len(source.class_names)} classes")
    state.wait_for_everyone()


def _prepare(
    config: EncodeConfig, vae: ModelMixin, images: ImageSet | None
) -> tuple[ImageSet | HubStream, dict[str, Any]]:
    """Check all settings, create the folder, and return the image source and the plan."""
    folder = Path(config.output)
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}: it must be at least 1")
    config.check_paths()
    shape = moments_shape(vae, config.image_size)
    skip = config.skip_unreadable
    source: ImageSet | HubStream
    if is_stream(config.data):
        source = HubStream(config.data, config.image_size, skip_unreadable=skip)
    else:
        source = images or open_images(config.data, config.image_size, skip_unreadable=skip)
    flipped = config.horizontal_flip
    image_bytes = math.prod(shape) * (1 + flipped) * np.dtype(config.dtype).itemsize
    images_per_shard = min(MAX_IMAGES_PER_SHARD, MAX_BYTES_PER_SHARD // image_bytes)
    num_images = source.num_images if isinstance(source, HubStream) else len(source)
    plan = {
        "format": FORMAT,
        "num_images": num_images,
        "image_size": config.image_size,
        "moments_shape": list(shape),
        "flipped": flipped,
        "dtype": config.dtype,
        "tf32": config.tf32,
        "images_per_shard": _whole_passes(images_per_shard),
        "autoencoder": {
            "identity": autoencoder_identity(vae),
            "name": choose_autoencoder(config.autoencoder, config.data),
            **latent_scaling(vae).statistics(),
        },
        "data": {"source": config.data, "fingerprint": source.fingerprint()},
        "class_names": source.class_names,
    }
    prepare_folder(folder, plan)
    written = sum(path.stat().st_size for path in folder.glob(f"{SHARD_PREFIX}*.npy"))
    if num_images is not None:
        require_disk_space(folder, num_images * image_bytes - written, f"output folder {folder}")
    return source, plan


def _read_shards(
    images: ImageSet, plan: dict[str, Any], shards: list[int], batch_size: int, num_workers: int
) -> Iterator[tuple[str, Batches]]:
    """Yield the file name and the batches of each of these shards."""
    for shard in shards:
        batches = index_batches(_image_range(plan, shard), batch_size)
        yield _shard_name(plan, shard), read_batches(images, batches, num_workers)


def _whole_passes(count: int) -> int:
    """Round a number of images down to whole forward passes, but at least to one pass."""
    return max(1, count // IMAGES_PER_PASS) * IMAGES_PER_PASS


def _encode(
    pixels: np.ndarray, vae: ModelMixin, plan: dict[str, Any], pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Yield the moments of a batch in order, (1 or 2, at most IMAGES_PER_PASS, 2C, h, w) each."""

    def encode(part: np.ndarray) -> np.ndarray:
        padded = np.resize(part, (IMAGES_PER_PASS, *part.shape[1:]))  # np.resize repeats images
        moments = encode_views(vae, padded, plan["flipped"])[:, : len(part)]
        return moments.numpy().astype(plan["dtype"])

    starts = range(0, len(pixels), IMAGES_PER_PASS)
    return pool.map(encode, [pixels[i : i + IMAGES_PER_PASS] for i in starts])


@contextlib.contextmanager
def _reproducible_threads(device: torch.device, tf32: bool) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool in which a forward pass always gives the same bits.

    On a CPU, the bits of a convolution depend on its number of threads, and launchers set that
    number according to the number of processes. Each pass therefore uses one thread, and
    several passes run in parallel.
    """
    num_threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        with ThreadPoolExecutor(
            num_threads if on_cpu else 1,
            initializer=torch.set_num_threads,
            initargs=(1 if on_cpu else num_threads,),
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _image_range(plan: dict[str, Any], shard: int) -> range:
    size = plan["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, plan["num_images"]))


def _num_shards(plan: dict[str, Any]) -> int:
    return -(-plan["num_images"] // plan["images_per_shard"])


def _shard_name(plan: dict[str, Any], shard: int) -> str:
    return f"{SHARD_PREFIX}{shard:05}-of-{_num_shards(plan):05}.npy"
