"""Encode a data set into sharded latents with any number of processes, resumable and reproducible.

Each of n processes encodes every n-th missing shard of an image set, or every n-th file of a stream
(``hub_stream``). ``latent_shards`` writes the files. The network always encodes the same number of
images in one pass, grouped independently of the number of processes, batch size and threads. The
latents are therefore the same, bit for bit.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import ModelMixin

from fid_eval.progress import progress_bar
from fid_eval.sets.decoding import POLICY_VERSION

from ..autoencoder import load_autoencoder, moments_shape
from ..common.disk_space import require_disk_space
from ..common.distributed import own_folder, run_on_main_process
from ..common.errors import UserError
from ..common.folder_lock import FolderLock
from ..common.paths import choose_autoencoder
from .config import EncodeConfig
from .encoding_passes import IMAGES_PER_PASS, Batches, encode_shards
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
from .latent_index import MOMENTS
from .latent_shards import (
    FORMAT,
    SHARD_PREFIX,
    earlier_plan,
    prepare_folder,
    write_index,
)
from .latents import autoencoder_facts, open_latents
from .read_ahead import default_workers

PIXELS_PER_PASS = 2**20  # on a GPU
MAX_IMAGES_PER_SHARD = 4096
MAX_BYTES_PER_SHARD = 256 * 2**20
TIMEOUT = timedelta(days=1)  # processes wait while rank 0 checks the data, and for the last shard


def encode_data(config: EncodeConfig, images: ImageSet | None = None) -> None:
    """Encode a data set into ``config.output``. Every process of a launch calls this function.

    Args:
        config: settings.
        images: the opened ``config.data``, if the caller has opened it already.

    Raises:
        UserError: bad data, an output that exists or is in use, or resuming with other settings or
            data.
    """
    if config.verify:
        _verify(Path(config.output))
        return
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
    source, plan = run_on_main_process(state, lambda: _prepare(config, vae, images, state.device))
    folder = Path(config.output)
    every_nth = slice(state.process_index, None, state.num_processes)
    batch_size = _whole_passes(config.batch_size, plan)
    shards: Iterator[tuple[str, Batches]]
    if isinstance(source, HubStream):
        total = source.num_images
        threads = config.num_workers or default_workers(total) or 1
        shards = source.parts(folder, plan["images_per_shard"], batch_size, threads, every_nth)
    else:
        present = set(os.listdir(folder))
        missing = [i for i in range(_num_shards(plan)) if _shard_name(plan, i) not in present]
        missing = missing[every_nth]
        total = sum(len(_image_range(plan, shard)) for shard in missing)
        workers = default_workers(total) if config.num_workers is None else config.num_workers
        shards = _read_shards(source, plan, missing, batch_size, workers)
    state.wait_for_everyone()  # every process has listed the existing shards
    with progress_bar(
        total,
        desc=f"encoding, 1 of {n}" if (n := state.num_processes) > 1 else "encoding",
        unit="img",
        enabled=state.is_main_process,
    ) as bar:
        start, vae = time.perf_counter(), vae.to(state.device)
        waiting = encode_shards(config, plan, vae, shards, bar.update, lock)
        seconds = time.perf_counter() - start
    conversions = gather_object([conversions_of(source)])
    if state.is_main_process:
        print_conversions(config.data, conversions)
        if isinstance(source, HubStream):
            names = source.finish(folder)
        else:
            names = [_shard_name(plan, shard) for shard in range(_num_shards(plan))]
        count = write_index(folder, plan, names)
        print(
            f"wrote {folder}: {count} images of {len(source.class_names)} classes; encoding took "
            f"{seconds:.1f} s, {waiting / seconds:.0%} of it waiting for decoded images"
        )
    state.wait_for_everyone()


def _verify(folder: Path) -> None:
    store = open_latents(folder)
    store.verify()
    print(f"latents {folder}: all files of {len(store)} images are as they were written")


def _prepare(
    config: EncodeConfig, vae: ModelMixin, images: ImageSet | None, device: torch.device
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
        classes = earlier_plan(folder).get("class_names")
        source = images or open_images(
            config.data, config.image_size, skip_unreadable=skip, earlier_classes=classes
        )
    flipped = config.horizontal_flip
    image_bytes = math.prod(shape) * (1 + flipped) * np.dtype(config.dtype).itemsize
    images_per_shard = min(MAX_IMAGES_PER_SHARD, MAX_BYTES_PER_SHARD // image_bytes)
    num_images = source.num_images if isinstance(source, HubStream) else len(source)
    plan = {
        "format": FORMAT,
        "num_images": num_images,
        "image_size": config.image_size,
        "arrays": {MOMENTS: {"dtype": config.dtype, "shape": list(shape)}},
        "flipped": flipped,
        "tf32": config.tf32,
        "mixed_precision": config.mixed_precision,
        "images_per_pass": _images_per_pass(config.image_size, device),
        "autoencoder": {
            "name": choose_autoencoder(config.autoencoder, config.data),
            **autoencoder_facts(vae),
        },
        "data": {"source": config.data, "fingerprint": source.fingerprint()},
        "decoding_policy": POLICY_VERSION,
        "class_names": source.class_names,
    }
    plan["images_per_shard"] = _whole_passes(images_per_shard, plan)
    plan = prepare_folder(folder, plan)
    written = sum(path.stat().st_size for path in folder.glob(f"{SHARD_PREFIX}*.npy"))
    if num_images is not None:
        require_disk_space(folder, num_images * image_bytes - written, f"output folder {folder}")
    return source, plan


def _images_per_pass(image_size: int, device: torch.device) -> int:
    if device.type == "cpu":
        return IMAGES_PER_PASS
    return min(256, max(IMAGES_PER_PASS, PIXELS_PER_PASS // image_size**2))


def _read_shards(
    images: ImageSet, plan: dict[str, Any], shards: list[int], batch_size: int, num_workers: int
) -> Iterator[tuple[str, Batches]]:
    """Yield the file name and the batches of each of these shards, which must be read in order."""
    indices = [index_batches(_image_range(plan, shard), batch_size) for shard in shards]
    # One loader for all shards: its workers start once and read ahead across shards.
    batches = read_batches(images, list(itertools.chain(*indices)), num_workers)
    for shard, parts in zip(shards, indices, strict=True):
        yield _shard_name(plan, shard), itertools.islice(batches, len(parts))


def _whole_passes(count: int, plan: dict[str, Any]) -> int:
    """Round a number of images down to whole passes, but at least to one pass."""
    size = plan.get("images_per_pass", IMAGES_PER_PASS)
    return max(1, count // size) * size


def _image_range(plan: dict[str, Any], shard: int) -> range:
    size = plan["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, plan["num_images"]))


def _num_shards(plan: dict[str, Any]) -> int:
    return -(-plan["num_images"] // plan["images_per_shard"])


def _shard_name(plan: dict[str, Any], shard: int) -> str:
    return f"{SHARD_PREFIX}{shard:05}-of-{_num_shards(plan):05}.npy"
