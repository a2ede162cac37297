"""Sample a set of exactly N images on any number of processes, resumable after any interruption.

``set_shards`` stores the finished images. The bytes of image i do not depend on the process that
samples it, so no other state is stored.
"""

import hashlib
import json
import math
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
from ..common.atomic_write import (
    atomic_write,
    publish,
    remove,
    remove_leftovers,
    sync_tree,
    temporary_path,
)
from ..common.disk_space import require_disk_space
from ..common.distributed import own_folder, run_on_main_process
from ..common.errors import UserError
from ..diffusion.noise import WORD, philox
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings, require_writable_output
from .engine import generate, round_up_to_units, use_settings
from .output_formats import FORMATS, check_set_output, partial_folder, settings_path
from .set_shards import SetShards, count_images, missing_batches

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
        UserError: before any work: the output exists or is in use; an unfinished set exists, but
            ``resume`` is not set or the settings differ; the disk is too full; the settings do not
            fit the model.
    """
    state = state or PartialState()
    chosen, _ = use_settings(pipeline, settings, guidance_model)
    require_writable_output(output)
    partial = partial_folder(output)
    identity = set_identity(chosen, settings, labels, guidance_model)
    shards = SetShards(partial, identity, len(labels), image_shape(chosen))
    batch_size = round_up_to_units(chosen.transformer, batch_size)

    def prepare() -> list[tuple[int, int]]:
        require_writable_output(output)  # an earlier owner may have finished it
        check_set_output(output, resume)
        remove_leftovers(output.parent)
        # The images are stored twice while they are copied from the partial folder to the output.
        needed = (2 * len(labels) - count_images(partial)) * image_bytes(chosen)
        require_disk_space(output, needed + SPARE_BYTES, f"output {output}")
        return missing_batches(shards.open(), len(labels), batch_size)

    with own_folder(state, partial) as lock:
        batches = run_on_main_process(state, prepare)
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
                lock.check()
                shards.write(int(positions[0]), images)
                progress.update()
            state.wait_for_everyone()
            progress.update()
        names = chosen.config.class_names
        run_on_main_process(
            state, lambda: join_shards(shards, output, labels, names, settings_yaml)
        )
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


def image_shape(pipeline: MoHDiTPipeline) -> tuple[int, int, int]:
    """Return the shape (H, W, 3) of one image of the pipeline."""
    side = pipeline.transformer.config.sample_size * downsampling_factor(pipeline.vae)
    return side, side, 3


def image_bytes(pipeline: MoHDiTPipeline) -> int:
    """Return the size in bytes of one image of the pipeline, as uint8."""
    return math.prod(image_shape(pipeline))


def join_shards(
    shards: SetShards,
    output: Path,
    labels: np.ndarray,
    class_names: Sequence[str] | None,
    settings_yaml: str | None,
) -> None:
    """Join the shards into ``output`` and delete them.

    Raises:
        UserError: a shard is missing or damaged, or ``output`` was created by another process.
    """
    joined = shards.folder / "joined"
    remove(joined)  # left by an interruption
    FORMATS[output.suffix](joined, shards.read_all(), labels, class_names)
    sync_tree(joined)
    if settings_yaml is not None and not output.exists():
        atomic_write(settings_path(output), settings_yaml.encode())
    try:
        publish(joined, output)
    except FileExistsError:
        raise UserError(
            f"output {output} was created by another process; the finished set is {joined}"
        ) from None
    # After an interruption, the rest of the folder is a leftover and not an unfinished set.
    remove(shards.folder.rename(temporary_path(shards.folder)))


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
