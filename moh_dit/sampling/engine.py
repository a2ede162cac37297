"""Images by (seed, index, class): the loop under grids and sets.

On the CPU an image has the same bytes whatever else is sampled with it. Matrix products of
different shapes, or split over a different number of threads, round differently; so there the work
is cut into units of a fixed number of images (a function of the model alone), image i always sits
in place i modulo that number, a unit runs on one thread, and as many units as there are threads
run side by side. On other devices a unit is a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..noise import ImageNoise
from ..pipeline import Guidance, MoHDiTPipeline
from ..schedulers import named_scheduler
from ..transformer import MoHDiTTransformer2DModel
from .config import SamplingSettings

# Fewer tokens at once leave a small model waiting for Python; more make a lone image wait for the
# empty places of its unit.
TOKENS_PER_UNIT = 256

StepObserver = Callable[[int, Tensor], None]


def use_settings(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    guidance_model: MoHDiTTransformer2DModel | None = None,
) -> tuple[MoHDiTPipeline, Guidance]:
    """The pipeline with the scheduler of ``settings``, and their guidance; checks both.

    The pipeline is a new one over the same modules: the caller's stays as it is.
    """
    scheduler = pipeline.scheduler
    if settings.scheduler is not None:
        scheduler = named_scheduler(settings.scheduler, scheduler)
    config = pipeline.config
    chosen = MoHDiTPipeline(
        pipeline.transformer, pipeline.vae, scheduler, config.class_names, config.prediction_type
    )
    guidance = Guidance(
        settings.guidance_scale,
        settings.guidance_channels,
        tuple(settings.guidance_interval),  # type: ignore[arg-type]
        guidance_model,
    )
    chosen.check(guidance, settings.num_inference_steps)
    return chosen, guidance


def generate(
    pipeline: MoHDiTPipeline,
    class_labels: Sequence[int | str],
    settings: SamplingSettings,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    decode_batch_size: int | None = None,
    guidance_model: MoHDiTTransformer2DModel | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of ``class_labels``, batch by batch.

    Args:
        pipeline: model, autoencoder and trained process; left as it is, whatever mode the model
            is in.
        class_labels: ids or names, N of them.
        settings: steps, guidance, scheduler and seed.
        indices: image number of each label; ``0 … N-1`` unless given.
        batch_size: images at once.
        decode_batch_size: images decoded at once; on the CPU always one.
        guidance_model: the weaker model of autoguidance.

    Yields:
        ``(positions, images)``: int64 (B,), which of the N these are, and uint8 (B, H, W, 3).

    Raises:
        UserError: before any work, for settings or labels that do not fit the model.
    """
    chosen, guidance = use_settings(pipeline, settings, guidance_model)
    labels = np.array(chosen.label_ids(class_labels), np.int64)
    numbers = np.arange(len(labels)) if indices is None else np.asarray(indices, np.int64)
    if len(numbers) != len(labels):
        raise ValueError(f"{len(numbers)} indices for {len(labels)} class labels")
    return _batches(chosen, guidance, settings, labels, numbers, batch_size, decode_batch_size)


def _batches(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    labels: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    decode_batch_size: int | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    on_cpu = pipeline.transformer.device.type == "cpu"

    def images_of(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
        latents = sample_latents(pipeline, guidance, settings, labels, indices)
        return to_uint8(pipeline.decode(latents, 1 if on_cpu else decode_batch_size))

    for start in range(0, len(labels), batch_size):
        positions = np.arange(start, min(start + batch_size, len(labels)))
        with evaluation_mode(pipeline.transformer, guidance.model), torch.no_grad():
            if on_cpu:
                images = run_units(pipeline, images_of, labels[positions], indices[positions])
            else:
                images = images_of(labels[positions], indices[positions])
        yield positions, images


def sample_latents(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    labels: np.ndarray,
    indices: np.ndarray,
) -> Tensor:
    """Latents (B, C, h, w) of one batch, as it is."""
    device = pipeline.transformer.device
    noise = ImageNoise(settings.seed, torch.as_tensor(indices), device)
    latents = pipeline.prepare_latents(len(labels), noise)
    classes = torch.as_tensor(labels, device=device)
    return pipeline.denoise(latents, classes, guidance, settings.num_inference_steps, noise)


def images_per_unit(transformer: MoHDiTTransformer2DModel) -> int:
    """How many images the CPU computes together, whatever the batch size."""
    config = transformer.config
    return max(1, TOKENS_PER_UNIT // (config.sample_size // config.patch_size) ** 2)


def plan_units(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Spread images over units of ``size`` places, image i in place i mod ``size``.

    Returns:
        For each unit an int64 (size,) of positions in ``indices``, -1 for an empty place.
    """
    units: list[np.ndarray] = []
    taken = [0] * size  # units whose place is taken, they fill up in order
    for position, index in enumerate(indices.tolist()):
        place = index % size
        if taken[place] == len(units):
            units.append(np.full(size, -1))
        units[taken[place]][place] = position
        taken[place] += 1
    return units


def run_units(
    pipeline: MoHDiTPipeline,
    images_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: np.ndarray,
    indices: np.ndarray,
) -> np.ndarray:
    """``images_of`` for a batch, unit by unit; uint8 (B, H, W, 3)."""
    size = images_per_unit(pipeline.transformer)

    @torch.no_grad()
    def run(unit: np.ndarray) -> np.ndarray:
        # An empty place computes image number ``place`` of class 0, and is thrown away.
        filled = unit >= 0
        images = images_of(
            np.where(filled, labels[unit], 0), np.where(filled, indices[unit], np.arange(size))
        )
        return images[filled]

    units, threads = plan_units(indices, size), torch.get_num_threads()
    try:
        workers = min(threads, len(units))
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(run, units))
    finally:
        torch.set_num_threads(threads)  # the default of threads to come
    images = np.concatenate(parts)
    order = np.concatenate([unit[unit >= 0] for unit in units])
    result = np.empty_like(images)
    result[order] = images
    return result


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in -1 … 1 → uint8 (B, H, W, 3), rounded to the nearest."""
    scaled = ((images / 2 + 0.5) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def evaluation_mode(*models: torch.nn.Module | None) -> Iterator[None]:
    """Put models in evaluation mode, and back."""
    training = [model for model in models if model is not None and model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
