"""Exactly so many images, over any number of processes, finished after any interruption.

    samples.npz.partial/           while it is being made, beside the output
      settings.json                what the images depend on; another run must agree to finish it
      images-START-STOP.npy        uint8 (STOP-START, H, W, 3), written aside and renamed when whole

Image i has the same bytes whoever makes it, so nothing else has to be remembered.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ..autoencoder import downsampling_factor
from ..common.atomic_write import atomic_write
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..common.progress import progress_bar
from ..diffusion.noise import WORD, philox
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate, use_settings, whole_units
from .output_formats import FORMATS, format_of

SPARE_BYTES = 64 << 20


def set_labels(
    num_samples: int, classes: Sequence[int], how: Literal["balanced", "drawn"], seed: int
) -> np.ndarray:
    """Class ids of a set, int64 (N,): in turn, or drawn evenly at random by (seed, index)."""
    index = torch.arange(num_samples)
    if how == "drawn":
        zero = torch.zeros_like(index)
        # This draw number is no image's: noise counts its draws from 0.
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
    batch_size: int = 64,
    decode_batch_size: int | None = None,
    record: str | None = None,
    state: PartialState | None = None,
    guidance_model: MoHDiTTransformer2DModel | None = None,
    quiet: bool = False,
) -> float | None:
    """Write the images of int64 ``labels`` (N,) to ``output``; image i has index i.

    Called by every process. A half-finished output of the same settings is finished.

    Args:
        pipeline: what to sample from; left as it is.
        settings: steps, guidance, scheduler and seed.
        output: ``.npz`` (ADM: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` int64 (N,)), ``.tar``
            (WebDataset) or, without a suffix, a folder of PNG files with ``labels.csv``.
        labels: class ids.
        batch_size: images per batch and process, on the CPU rounded up to whole units; also the
            images that an interruption can cost.
        decode_batch_size: images decoded at once.
        record: the settings as YAML, written beside the output.
        state: the processes, as accelerate knows them; those already started unless given.
        guidance_model: the weaker model of autoguidance.
        quiet: no progress.

    Returns:
        Images per second over all processes without the first batch of each and without joining
        the shards; ``None`` where nothing is left of it, and on all processes but the first.

    Raises:
        UserError: before any work: the output exists, a half-finished one was made with other
            settings, the disk is too full, or settings do not fit the model.
    """
    state = state or PartialState()
    chosen, _ = use_settings(pipeline, settings, guidance_model)
    described = describe(chosen, settings, labels, guidance_model)
    partial = partial_folder(output)
    check_output(output, partial, described)
    to_write = 2 * len(labels) - images_done(partial)
    needed = to_write * image_bytes(chosen) + SPARE_BYTES
    require_disk_space(output, needed, f"output {output}")
    state.wait_for_everyone()  # every process has looked before the first one writes

    if state.is_main_process:
        partial.mkdir(parents=True, exist_ok=True)
        atomic_write(partial / "settings.json", json.dumps(described, indent=1).encode())
    state.wait_for_everyone()
    batch_size = whole_units(chosen.transformer, batch_size)
    batches = missing_batches(partial, len(labels), batch_size)
    state.wait_for_everyone()  # every process has the same list before it changes

    progress = Progress(partial, len(labels), state.is_main_process, quiet)
    with progress:
        for start, stop in batches[state.process_index :: state.num_processes]:
            ((_, images),) = generate(
                pipeline,
                labels[start:stop].tolist(),
                settings,
                indices=range(start, stop),
                batch_size=batch_size,
                pad=len(labels) > batch_size,
                decode_batch_size=decode_batch_size,
                guidance_model=guidance_model,
            )
            write_shard(partial, start, images)
            progress.update()
        state.wait_for_everyone()
        progress.update()
    if state.is_main_process:
        finish(partial, output, labels, chosen.config.class_names, record)
    state.wait_for_everyone()
    return progress.rate


def partial_folder(output: Path) -> Path:
    """Where an output is while it is being made."""
    return output.with_name(output.name + ".partial")


def describe(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    labels: np.ndarray,
    guidance_model: MoHDiTTransformer2DModel | None = None,
) -> dict[str, Any]:
    """What the images of a set depend on, as JSON knows it."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    described = {
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
    return json.loads(json.dumps(described, default=str))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_output(output: Path, partial: Path, described: dict[str, Any]) -> None:
    """Raise ``UserError`` where something already produced would be lost."""
    format_of(output)
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    if not (partial / "settings.json").is_file():
        if any(not file.name.startswith(".") for file in partial.glob("*")):
            raise UserError(f"{partial} is in the way: it is not a half-finished output")
        return
    before = json.loads((partial / "settings.json").read_text())
    was, now = flattened(before), flattened(described)
    differing = [
        f"{key} {was.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"{partial} was begun with other settings: {'; '.join(differing)}; finish it with "
            "those, delete it, or give another output"
        )


def flattened(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = flattened(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): item for name, item in inner.items()}
    return flat


def image_bytes(pipeline: MoHDiTPipeline) -> int:
    """Bytes of one image of the pipeline, as uint8."""
    side = pipeline.transformer.config.sample_size * downsampling_factor(pipeline.vae)
    return side * side * 3


def shards(partial: Path) -> list[tuple[int, int, Path]]:
    """``(start, stop, file)`` of what is done, in order."""
    found = []
    for file in partial.glob("images-*-*.npy"):
        start, stop = file.stem.split("-")[1:]
        found.append((int(start), int(stop), file))
    return sorted(found)


def images_done(partial: Path) -> int:
    """How many images a half-finished output has."""
    return sum(stop - start for start, stop, _ in shards(partial))


def missing_batches(partial: Path, num_samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Ranges of images still to make, none longer than ``batch_size``."""
    batches = []
    position = 0
    for start, stop, _ in [*shards(partial), (num_samples, num_samples, partial)]:
        cuts = range(position, start, batch_size)
        batches += [(cut, min(cut + batch_size, start)) for cut in cuts]
        position = stop
    return batches


def write_shard(partial: Path, start: int, images: np.ndarray) -> None:
    """Keep finished images, whole or not at all."""
    name = f"images-{start:09d}-{start + len(images):09d}.npy"
    aside = partial / f".{name}.{os.getpid()}"
    with aside.open("wb") as file:
        np.save(file, images)
    aside.replace(partial / name)


def finish(
    partial: Path,
    output: Path,
    labels: np.ndarray,
    class_names: Sequence[str] | None,
    record: str | None,
) -> None:
    """Join the shards into ``output`` and remove them."""
    found = shards(partial)
    assert images_done(partial) == len(labels)
    assert [start for start, _, _ in found] == [0, *(stop for _, stop, _ in found[:-1])]
    arrays = (np.load(file) for _, _, file in found)
    aside = partial / "joined"
    if aside.is_dir():  # an interrupted folder; a file is written over
        shutil.rmtree(aside)
    FORMATS[format_of(output)](aside, arrays, labels, class_names)
    if record is not None:
        atomic_write(output.with_name(output.name + ".yaml"), record.encode())
    aside.replace(output)
    shutil.rmtree(partial)


class Progress:
    """A bar over the images of all processes; its rate leaves out the first batch.

    Args:
        partial: where the images appear.
        total: how many there will be.
        first_process: whether this process is the one that tells.
        quiet: whether it only measures.
    """

    def __init__(self, partial: Path, total: int, first_process: bool, quiet: bool):
        self.partial, self.total, self.measuring = partial, total, first_process
        self.shown = first_process and not quiet
        self.bar: Any = None
        self.rate: float | None = None
        if self.shown:
            done = images_done(partial)
            known = f", {done} of them made before" if done else ""
            print(f"{total} images{known}; the rate leaves out the first batch")

    def __enter__(self) -> "Progress":
        return self

    def update(self) -> None:
        """Look at what is done; the first look, after a batch, starts the clock."""
        if not self.measuring:
            return
        done = images_done(self.partial)
        if self.bar is None and done < self.total:
            self.bar = progress_bar(
                self.total, desc="images", unit="image", initial=done, enabled=self.shown
            )
            self.began, self.before = time.monotonic(), done
        elif self.bar is not None:
            self.rate = (done - self.before) / (time.monotonic() - self.began)
            self.bar.update(done - self.bar.n)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.shown and self.rate:
            print(f"{self.rate:.2f} images/s")
