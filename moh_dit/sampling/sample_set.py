"""Sample a set of exactly N images on any number of processes, resumable after any interruption.

    samples.npz.partial/           exists beside the output until the set is finished
      settings.json                settings that determine the images; resuming requires the same
      images-START-STOP.npy        uint8 (STOP-START, H, W, 3), written atomically

The bytes of image i do not depend on the process that samples it, so no other state is stored.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from fid_eval.progress import progress_bar

from ..autoencoder import downsampling_factor
from ..common.atomic_write import atomic_write, remove
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..diffusion.noise import WORD, philox
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings, require_writable_output
from .engine import generate, round_up_to_units, use_settings
from .output_formats import FORMATS, check_set_output, partial_folder, settings_path

SPARE_BYTES = 64 << 20


def set_labels(
    num_samples: int, classes: Sequence[int], how: Literal["balanced", "drawn"], seed: int
) -> np.ndarray:
    """Return the class ids of a set, int64 (N,).

    ``"balanced"`` takes the classes in turn. ``"drawn"`` picks each uniformly at random, determined
    by (seed, index).
    """
    index = torch.arange(num_samples)
    if how == "drawn":
        zero = torch.zeros_like(index)
        # Image noise counts its draws from 0 and never reaches this draw number.
        word = philox((zero, zero + WORD, index & WORD, index >> 32), seed)[0]
        choice = word * len(classes) >> 32
    else:
        choice = index % len(classes)
    return np.asarray(classes, np.int64)[choice.numpy()]


def sample_set(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    output: Path,
    labels: np.ndarray,
    *,
    resume: bool = False,
    batch_size: int = 64,
    decode_batch_size: int | None = None,
    settings_yaml: str | None = None,
    state: PartialState | None = None,
    guidance_model: MoHDiTTransformer2DModel | None = None,
    quiet: bool = False,
) -> float | None:
    """Sample an image for each label and write them to ``output``; image i has index i.

    Every process must call this function.

    Args:
        pipeline: the pipeline to sample from; it is not changed.
        settings: steps, guidance, scheduler and seed.
        output: ``.npz`` (ADM: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` int64 (N,)), ``.tar``
            (WebDataset) or, without a suffix, a folder of PNG files with ``labels.csv``.
        labels: class ids, int64 (N,).
        resume: continue an unfinished set with the same settings; start if there is none.
        batch_size: images per batch and process. The CPU rounds it up to whole units. An
            interruption loses at most one batch per process.
        decode_batch_size: images to decode at once.
        settings_yaml: text to write beside the output as ``OUTPUT.yaml``.
        state: accelerate's state of the processes; created if not given.
        guidance_model: weaker model for autoguidance.
        quiet: show no progress.

    Returns:
        On the main process images per second over all processes, without the first batch and the
        writing of the output. ``None`` if there was only one batch, and on the other processes.

    Raises:
        UserError: before any work: the output exists; an unfinished set exists, but ``resume`` is
            not set or the settings differ; the disk is too full; the settings do not fit the model.
    """
    state = state or PartialState()
    chosen, _ = use_settings(pipeline, settings, guidance_model)
    identity = set_identity(chosen, settings, labels, guidance_model)
    partial = partial_folder(output)
    require_writable_output(output)
    check_set_output(output, resume)
    check_same_settings(partial, identity)
    # The images are stored twice while they are copied from the partial folder to the output.
    needed = (2 * len(labels) - count_images(partial)) * image_bytes(chosen)
    require_disk_space(output, needed + SPARE_BYTES, f"output {output}")
    state.wait_for_everyone()  # all processes check before the first one writes

    if state.is_main_process:
        partial.mkdir(parents=True, exist_ok=True)
        atomic_write(partial / "settings.json", json.dumps(identity, indent=1).encode())
    state.wait_for_everyone()
    batch_size = round_up_to_units(chosen.transformer, batch_size)
    batches = missing_batches(partial, len(labels), batch_size)
    state.wait_for_everyone()  # all processes list the missing batches before the first new one

    with closing(SetProgress(partial, len(labels), state.is_main_process, quiet)) as progress:
        for positions, images in generate(
            pipeline,
            labels.tolist(),
            settings,
            batch_size=batch_size,
            batches=batches[state.process_index :: state.num_processes],
            pad=len(labels) > batch_size,
            decode_batch_size=decode_batch_size,
            guidance_model=guidance_model,
        ):
            write_shard(partial, int(positions[0]), images)
            progress.update()
        state.wait_for_everyone()
        progress.update()
    if state.is_main_process:
        join_shards(partial, output, labels, chosen.config.class_names, settings_yaml)
    state.wait_for_everyone()
    return progress.rate


def set_identity(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    labels: np.ndarray,
    guidance_model: MoHDiTTransformer2DModel | None = None,
) -> dict[str, Any]:
    """Return everything that determines the images of a set, as it reads back from JSON."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    identity = {
        **{field.name: getattr(settings, field.name) for field in fields(SamplingSettings)},
        "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
        "num_samples": len(labels),
        "labels": hashlib.sha256(labels.tobytes()).hexdigest(),
        "transformer": weights_digest(pipeline.transformer),
        "vae": weights_digest(pipeline.vae),
        "guidance_model": weights_digest(guidance_model) if guidance_model is not None else None,
        "decode_dtype": str(pipeline.vae.dtype).removeprefix("torch."),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
    }
    return json.loads(json.dumps(identity, default=str))


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 digest of the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_same_settings(partial: Path, identity: dict[str, Any]) -> None:
    """Raise ``UserError`` if an unfinished set was started with other settings."""
    if not (partial / "settings.json").is_file():
        return
    before = flatten_dict(json.loads((partial / "settings.json").read_text()))
    now = flatten_dict(identity)
    differing = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"{partial} was started with other settings: {'; '.join(differing)}; resume with the "
            "same settings, delete the folder, or give another output"
        )


def flatten_dict(nested: dict[str, Any]) -> dict[str, Any]:
    """Turn nested dictionaries into one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flatten_dict(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return flat


def image_bytes(pipeline: MoHDiTPipeline) -> int:
    """Return the size in bytes of one image of the pipeline, as uint8."""
    side = pipeline.transformer.config.sample_size * downsampling_factor(pipeline.vae)
    return side * side * 3


def list_shards(partial: Path) -> list[tuple[int, int, Path]]:
    """Return ``(start, stop, file)`` of each finished shard, in order."""
    found = []
    for file in partial.glob("images-*-*.npy"):
        start, stop = file.stem.split("-")[1:]
        found.append((int(start), int(stop), file))
    return sorted(found)


def count_images(partial: Path) -> int:
    """Return how many images of an unfinished set are done."""
    return sum(stop - start for start, stop, _ in list_shards(partial))


def missing_batches(partial: Path, num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the ranges ``(start, stop)`` of missing images, each at most ``batch_size`` long."""
    batches = []
    position = 0
    for start, stop, _ in [*list_shards(partial), (num_samples, num_samples, partial)]:
        cuts = range(position, start, batch_size)
        batches += [(cut, min(cut + batch_size, start)) for cut in cuts]
        position = stop
    return batches


def write_shard(partial: Path, start: int, images: np.ndarray) -> None:
    """Write finished images to a shard, atomically."""
    name = f"images-{start:09d}-{start + len(images):09d}.npy"
    temporary = partial / f".{name}.{os.getpid()}"
    with temporary.open("wb") as file:
        np.save(file, images)
    temporary.replace(partial / name)


def join_shards(
    partial: Path,
    output: Path,
    labels: np.ndarray,
    class_names: Sequence[str] | None,
    settings_yaml: str | None,
) -> None:
    """Join the shards into ``output`` and delete them."""
    shards = list_shards(partial)
    assert count_images(partial) == len(labels)
    assert [start for start, _, _ in shards] == [0, *(stop for _, stop, _ in shards[:-1])]
    arrays = (np.load(file) for _, _, file in shards)
    joined = partial / "joined"
    remove(joined)  # left by an interruption
    FORMATS[output.suffix](joined, arrays, labels, class_names)
    if settings_yaml is not None:
        atomic_write(settings_path(output), settings_yaml.encode())
    joined.replace(output)
    shutil.rmtree(partial)


class SetProgress:
    """A progress bar over the images of all processes. Its rate leaves out the first batch.

    Args:
        partial: folder with the finished shards.
        total: number of images of the set.
        is_main_process: whether this process measures and shows progress.
        quiet: measure without showing anything.
    """

    def __init__(self, partial: Path, total: int, is_main_process: bool, quiet: bool):
        self.partial, self.total, self.measuring = partial, total, is_main_process
        self.visible = is_main_process and not quiet
        self.bar: Any = None
        self.rate: float | None = None
        if self.visible:
            done = count_images(partial)
            resumed = f", {done} of them already finished" if done else ""
            print(f"sampling {total} images{resumed}; the rate leaves out the first batch")

    def update(self) -> None:
        """Count the finished images. The first call, after the first batch, starts the clock."""
        if not self.measuring:
            return
        done = count_images(self.partial)
        if self.bar is None and done < self.total:
            self.bar = progress_bar(
                self.total, desc="images", unit="image", initial=done, enabled=self.visible
            )
            self.start_time, self.start_count = time.monotonic(), done
        elif self.bar is not None:
            self.rate = (done - self.start_count) / (time.monotonic() - self.start_time)
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Close the bar and print the rate."""
        if self.bar is not None:
            self.bar.close()
        if self.visible and self.rate:
            print(f"{self.rate:.2f} images/s")
