"""Encode a data set into sharded latents: any number of processes, resumable, deterministic.

A process works on every n-th missing shard of a set of images, or every n-th file of a stream
(``streaming``); how shards are kept whole is in ``shards``. The network always sees
``IMAGES_PER_PASS`` images, the same ones together whatever the number of processes, the batch size
and the threads, so the bits come out the same.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL

from ..autoencoder import autoencoder_identity, latent_scaling, latent_shape, load_autoencoder
from ..common.disk_space import require_disk_space
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..common.progress import progress_bar
from .config import EncodeConfig
from .hub_stream import HubStream
from .hugging_face import is_stream
from .images import ImageSet, open_images, read_batches
from .latent_shards import (
    SHARD_PREFIX,
    open_folder,
    refuse_existing,
    write_index,
    write_shard,
)
from .latents import FORMAT, encode_both, index_batches

IMAGES_PER_PASS = 8
MAX_IMAGES_PER_SHARD = 4096
MAX_BYTES_PER_SHARD = 256 * 2**20

Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # uint8 (B, S, S, 3) and int64 (B,)


def encode_data(config: EncodeConfig, images: ImageSet | None = None) -> None:
    """Encode into ``config.output``; run by each process of an ``accelerate launch``.

    Args:
        config: what to encode, and how.
        images: ``config.data``, where it is open already.

    Raises:
        UserError: bad data, an output that exists, or resuming with other settings or data.
    """
    # The others wait while one process looks through the data, and for the last shard.
    patience = timedelta(days=1)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)
    vae = load_autoencoder(config.autoencoder)
    source, plan = run_on_main_process(state, lambda: _prepare(config, vae, images))
    folder = Path(config.output)
    state.wait_for_everyone()
    place = state.process_index, state.num_processes
    mine: Iterator[tuple[str, Batches]]
    if isinstance(source, HubStream):
        total = source.num_images
        mine = source.parts(
            folder,
            plan["images_per_shard"],
            whole_passes(config.batch_size),
            max(1, config.num_workers),
            *place,
        )
    else:
        total, mine = _missing_shards(folder, plan, source, config, *place)
    state.wait_for_everyone()  # all have seen the same shards before new ones come
    vae = vae.to(state.device)
    with (
        _arithmetic(state.device, config.tf32) as pool,
        progress_bar(
            total,
            desc="encoding" + (f", 1 of {n}" if (n := state.num_processes) > 1 else ""),
            unit="img",
            enabled=state.is_main_process,
        ) as bar,
    ):
        for name, batches in mine:
            parts: list[np.ndarray] = []
            labels: list[np.ndarray] = [np.empty(0, np.int64)]
            for pixels, of_them in batches:
                parts += _encode(pixels, vae, plan, pool)
                labels.append(of_them)
                bar.update(len(of_them))
            nothing = np.empty((1 + plan["flipped"], 0, *plan["moments_shape"]), plan["dtype"])
            moments = np.concatenate([nothing, *parts], axis=1, dtype=plan["dtype"])
            write_shard(folder / name, moments, np.concatenate(labels))
    state.wait_for_everyone()
    if state.is_main_process:
        if isinstance(source, HubStream):
            names = source.finish(folder)
        else:
            names = [_shard_name(plan, shard) for shard in range(_num_shards(plan))]
        count = write_index(folder, plan, names)
        print(f"wrote {folder}: {count} images of {len(source.class_names)} classes")
    state.wait_for_everyone()


def _prepare(
    config: EncodeConfig, vae: AutoencoderKL, images: ImageSet | None
) -> tuple[ImageSet | HubStream, dict[str, Any]]:
    """Check everything and make the folder; return the source and the plan."""
    folder = Path(config.output)
    if config.batch_size < 1:
        raise UserError(f"batch size {config.batch_size}: must be at least 1")
    refuse_existing(folder, config.resume)
    shape = latent_shape(vae, config.image_size)
    options = dict(skip_unreadable=config.skip_unreadable)
    source: ImageSet | HubStream
    if is_stream(config.data):
        source = HubStream(config.data, config.image_size, **options)
    else:
        source = images or open_images(config.data, config.image_size, **options)
    moments_shape = (2 * shape[0], *shape[1:])
    image_bytes = int(np.prod(moments_shape)) * (1 + config.flip) * np.dtype(config.dtype).itemsize
    images_per_shard = min(MAX_IMAGES_PER_SHARD, MAX_BYTES_PER_SHARD // image_bytes)
    num_images = source.num_images if isinstance(source, HubStream) else len(source)
    plan = {
        "format": FORMAT,
        "num_images": num_images,
        "image_size": config.image_size,
        "moments_shape": list(moments_shape),
        "flipped": config.flip,
        "dtype": config.dtype,
        "tf32": config.tf32,
        "images_per_shard": max(1, images_per_shard // IMAGES_PER_PASS) * IMAGES_PER_PASS,
        "autoencoder": {
            "identity": autoencoder_identity(vae),
            "name": config.autoencoder,
            **latent_scaling(vae)._asdict(),
        },
        "data": {"source": config.data, "fingerprint": source.fingerprint()},
        "class_names": source.class_names,
    }
    open_folder(folder, plan)
    made = sum(path.stat().st_size for path in folder.glob(f"{SHARD_PREFIX}*.npy"))
    if num_images is not None:
        require_disk_space(folder, num_images * image_bytes - made, f"output folder {folder}")
    return source, plan


def _missing_shards(
    folder: Path, plan: dict[str, Any], images: ImageSet, config: EncodeConfig, rank: int, size: int
) -> tuple[int, Iterator[tuple[str, Batches]]]:
    """Number of images, and name and images of each shard, that this process has to encode."""
    present = set(os.listdir(folder))
    missing = [i for i in range(_num_shards(plan)) if _shard_name(plan, i) not in present]
    mine = missing[rank::size]

    def shards() -> Iterator[tuple[str, Batches]]:
        for shard in mine:
            batches = index_batches(_members(plan, shard), whole_passes(config.batch_size))
            yield _shard_name(plan, shard), read_batches(images, batches, config.num_workers)

    return sum(len(_members(plan, shard)) for shard in mine), shards()


def whole_passes(batch_size: int) -> int:
    """The batch size that cuts no pass in two."""
    return max(1, batch_size // IMAGES_PER_PASS) * IMAGES_PER_PASS


def _encode(
    pixels: np.ndarray, vae: AutoencoderKL, plan: dict[str, Any], pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Moments of a batch in order, (1 or 2, IMAGES_PER_PASS or fewer, 2C, h, w) at a time."""

    def encode(part: np.ndarray) -> np.ndarray:
        whole = np.resize(part, (IMAGES_PER_PASS, *part.shape[1:]))  # the last one is filled up
        moments = encode_both(vae, whole, plan["flipped"])[:, : len(part)]
        return moments.numpy().astype(plan["dtype"])

    starts = range(0, len(pixels), IMAGES_PER_PASS)
    return pool.map(encode, [pixels[i : i + IMAGES_PER_PASS] for i in starts])


@contextlib.contextmanager
def _arithmetic(device: torch.device, tf32: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads that each encode whole passes, to the same bits every time.

    On a CPU the bits of a convolution depend on the number of threads that share it, and launchers
    set that number by the number of processes: so a pass gets one thread, and passes run beside
    each other.
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


def _members(plan: dict[str, Any], shard: int) -> range:
    size = plan["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, plan["num_images"]))


def _num_shards(plan: dict[str, Any]) -> int:
    return -(-plan["num_images"] // plan["images_per_shard"])


def _shard_name(plan: dict[str, Any], shard: int) -> str:
    return f"{SHARD_PREFIX}{shard:05}-of-{_num_shards(plan):05}.npy"
