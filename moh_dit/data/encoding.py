"""Encode a data set into sharded latents: any number of processes, resumable, deterministic.

A shard is a ``.npy`` of the moments of consecutive images, (1 or 2, n, 2C, h, w); it is written
aside, synced and renamed, so whatever has its name is whole. A process works on
every n-th missing shard. The network always sees ``IMAGES_PER_PASS`` images, the same ones together
whatever the number of processes, the batch size and the threads, so the bits come out the same.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKL

from ..autoencoder import autoencoder_identity, latent_scaling, latent_shape, load_autoencoder
from ..errors import UserError
from ..progress import progress_bar
from .images import ImageSet, open_images, read_batches
from .latents import (
    FORMAT,
    INDEX_FILE,
    LABELS_FILE,
    PLAN_FILE,
    content_hash,
    encode_both,
    index_batches,
)

IMAGES_PER_PASS = 8
MAX_IMAGES_PER_SHARD = 4096
MAX_BYTES_PER_SHARD = 256 * 2**20
HASH_SUFFIX = ".sha256"
PARTIAL_SUFFIX = ".partial"


@dataclass
class Encoding:
    """Encode a data set once into sharded latents."""

    output: str
    """Folder to write; must not exist, unless resumed."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, or hf:NAME."""
    image_size: int = 32
    """Side of the images in pixels."""
    autoencoder: str = "digits"
    """"digits", a folder or a hub id."""
    flip: bool = True
    """Encode the mirrored images too."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the moments; float16 halves the files and rounds at 5e-4 relative."""
    tf32: bool = False
    """Encode with TF32 on NVIDIA GPUs: faster, relative errors of about 1e-3."""
    batch_size: int = 64
    """Images read and moved to the device at once; has no influence on the result."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read instead of stopping."""
    num_workers: int = 0
    """Loader processes per encoding process."""
    resume: bool = False
    """Continue an encoding that was stopped."""


def encode_data(config: Encoding) -> None:
    """Encode into ``config.output``; run by each process of an ``accelerate launch``.

    Raises:
        UserError: bad data, an output that exists, or resuming with other settings or data.
    """
    # The others wait while one process looks through the data, and for the last shard.
    patience = timedelta(days=1)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)
    vae = load_autoencoder(config.autoencoder)
    # The main process looks at the data and the folder; the others hear what it found.
    heard: list[Any] = [None]
    if state.is_main_process:
        try:
            heard = [_prepare(config, vae)]
        except UserError as error:
            heard = [error]
    if state.num_processes > 1:
        broadcast_object_list(heard)
    if isinstance(heard[0], UserError):
        raise heard[0]
    images, plan, missing = heard[0]

    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.tf32
    folder = Path(config.output)
    mine = missing[state.process_index :: state.num_processes]
    vae = vae.to(state.device)
    with (
        _encoding_threads(state.device) as pool,
        progress_bar(
            sum(len(_members(plan, shard)) for shard in mine),
            desc="encoding" + (f", 1 of {n}" if (n := state.num_processes) > 1 else ""),
            unit="img",
            enabled=state.is_main_process,
        ) as bar,
    ):
        for shard in mine:
            moments = np.empty(_shard_shape(plan, shard), plan["dtype"])
            start = 0
            for part in _encode_shard(images, vae, plan, shard, config, pool):
                moments[:, start : start + part.shape[1]] = part
                start += part.shape[1]
                bar.update(part.shape[1])
            _write_shard(folder, _shard_name(plan, shard), moments)
    state.wait_for_everyone()
    if state.is_main_process:
        _write_index(folder, plan, images)
        print(f"wrote {folder}: {len(images)} images of {len(images.class_names)} classes")
    state.wait_for_everyone()


def _prepare(config: Encoding, vae: AutoencoderKL) -> tuple[ImageSet, dict[str, Any], list[int]]:
    """Check everything, make the folder; return the images, the plan and the shards to make."""
    folder = Path(config.output)
    if config.batch_size < 1:
        raise UserError(f"batch size {config.batch_size}: must be at least 1")
    if (folder / INDEX_FILE).exists():
        raise UserError(f"latents {folder} are already complete: give a new name")
    if folder.exists() and not config.resume:
        raise UserError(f"output folder {folder} exists: give a new name, or --resume")
    shape = latent_shape(vae, config.image_size)
    images = open_images(config.data, config.image_size, skip_unreadable=config.skip_unreadable)
    moments_shape = (2 * shape[0], *shape[1:])
    image_bytes = int(np.prod(moments_shape)) * (1 + config.flip) * np.dtype(config.dtype).itemsize
    images_per_shard = min(MAX_IMAGES_PER_SHARD, MAX_BYTES_PER_SHARD // image_bytes)
    plan = {
        "format": FORMAT,
        "num_images": len(images),
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
        "data": {"source": config.data, "fingerprint": images.fingerprint()},
        "class_names": images.class_names,
    }
    if (folder / PLAN_FILE).is_file():
        _check_same_plan(folder, plan)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"output folder {folder} holds other things: give a new name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_aside(folder / PLAN_FILE, json.dumps(plan, indent=2).encode() + b"\n")
    for leftover in folder.glob(f".*{PARTIAL_SUFFIX}"):  # of a process that was killed
        leftover.unlink()
    present = set(os.listdir(folder))
    missing = [i for i in range(_num_shards(plan)) if _shard_name(plan, i) not in present]
    need = len(missing) * int(np.prod(_shard_shape(plan, 0))) * np.dtype(config.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"output folder {folder}: the latents need {need / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free"
        )
    return images, plan, missing


def _check_same_plan(folder: Path, plan: dict[str, Any]) -> None:
    earlier = json.loads((folder / PLAN_FILE).read_text())
    if earlier["autoencoder"]["identity"] == plan["autoencoder"]["identity"]:
        earlier["autoencoder"] = plan["autoencoder"]  # the same weights from wherever
    if earlier["data"]["fingerprint"] == plan["data"]["fingerprint"]:
        earlier["data"] = plan["data"]
    if different := [key for key in plan if earlier.get(key) != plan[key]]:
        raise UserError(
            f"latents {folder} were begun with other settings ({', '.join(different)} differ): "
            "give the same ones, or a new name"
        )


def _encode_shard(
    images: ImageSet,
    vae: AutoencoderKL,
    plan: dict[str, Any],
    shard: int,
    config: Encoding,
    pool: ThreadPoolExecutor,
) -> Iterator[np.ndarray]:
    """Moments of a shard in order, (1 or 2, IMAGES_PER_PASS or fewer, 2C, h, w) at a time."""

    def encode(part: np.ndarray) -> np.ndarray:
        whole = np.resize(part, (IMAGES_PER_PASS, *part.shape[1:]))  # the last one is filled up
        return encode_both(vae, whole, plan["flipped"])[:, : len(part)].numpy()

    passes = max(1, config.batch_size // IMAGES_PER_PASS)
    batches = index_batches(_members(plan, shard), passes * IMAGES_PER_PASS)
    for pixels, _ in read_batches(images, batches, config.num_workers):
        starts = range(0, len(pixels), IMAGES_PER_PASS)
        yield from pool.map(encode, [pixels[i : i + IMAGES_PER_PASS] for i in starts])


@contextlib.contextmanager
def _encoding_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that each encode whole passes.

    On a CPU the bits of a convolution depend on the number of threads that share it, and launchers
    set that number by the number of processes: so a pass gets one thread, and passes run beside
    each other.
    """
    num_threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    try:
        with ThreadPoolExecutor(
            num_threads if on_cpu else 1,
            initializer=torch.set_num_threads,
            initargs=(1 if on_cpu else num_threads,),
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def _members(plan: dict[str, Any], shard: int) -> range:
    size = plan["images_per_shard"]
    return range(shard * size, min((shard + 1) * size, plan["num_images"]))


def _shard_shape(plan: dict[str, Any], shard: int) -> tuple[int, ...]:
    return (1 + plan["flipped"], len(_members(plan, shard)), *plan["moments_shape"])


def _num_shards(plan: dict[str, Any]) -> int:
    return -(-plan["num_images"] // plan["images_per_shard"])


def _shard_name(plan: dict[str, Any], shard: int) -> str:
    return f"moments-{shard:05}-of-{_num_shards(plan):05}.npy"


def _write_shard(folder: Path, name: str, moments: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, moments)
    data = content.getbuffer()
    # The hash first: once the shard has its name, the hash is there too.
    _write_aside(folder / f"{name}{HASH_SUFFIX}", hashlib.sha256(data).hexdigest().encode())
    _write_aside(folder / name, data)


def _write_index(folder: Path, plan: dict[str, Any], images: ImageSet) -> None:
    names = [_shard_name(plan, shard) for shard in range(_num_shards(plan))]
    shards = [
        {
            "file": name,
            "num_images": len(_members(plan, shard)),
            "sha256": (folder / f"{name}{HASH_SUFFIX}").read_text(),
        }
        for shard, name in enumerate(names)
    ]
    labels = io.BytesIO()
    np.save(labels, np.asarray(images.labels, np.int64))
    _write_aside(folder / LABELS_FILE, labels.getbuffer())
    index = {**plan, "shards": shards}
    index["content_hash"] = content_hash(index, images.labels)
    _write_aside(folder / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")
    for name in [PLAN_FILE, *(f"{name}{HASH_SUFFIX}" for name in names)]:
        (folder / name).unlink()  # the index has it all now


def _write_aside(path: Path, data: bytes | memoryview) -> None:
    handle, name = tempfile.mkstemp(prefix=".", suffix=PARTIAL_SUFFIX, dir=path.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what is finished stays: mend that and "
            "give the command again with --resume"
        ) from None
