"""Sample images identified by (seed, index, class). Grids and sets are built on this.

On the CPU the bytes of an image do not depend on the other images in its batch. Matrix products of
another shape, or split over another number of threads, round differently. The CPU therefore
computes units of a fixed number of images, which depends only on the model. Image i always sits in
row ``i % unit`` of its unit. Each unit runs on one thread, and one unit per thread runs at a time.
Other devices compute each batch at once.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from ..diffusion.noise import BlendedNoise, ImageNoise
from ..diffusion.samplers import named_scheduler, prepare_scheduler
from ..model.attention import MoHAttention
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.guidance import Guidance
from ..pipeline.pipeline import MoHDiTPipeline
from ..pipeline.step_cache import StepCache, caching
from .config import SamplingSettings

# With fewer tokens per unit, Python overhead dominates for small models. With more, sampling a
# single image spends most of its time on the padding of its unit.
TOKENS_PER_UNIT = 256

# One requested image. ``position``: its place among the requested images, -1 for padding.
REQUEST = np.dtype(
    [("label", "i8"), ("index", "i8"), ("other", "i8"), ("fraction", "f8"), ("position", "i8")]
)
OnStep: TypeAlias = Callable[[np.ndarray, int, Tensor], None]


def use_settings(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    guidance_model: MoHDiTTransformer2DModel | None = None,
) -> tuple[MoHDiTPipeline, Guidance]:
    """Return a pipeline with the scheduler of ``settings``, and the guidance of ``settings``.

    The returned pipeline shares the modules of ``pipeline``, which is not changed.

    Raises:
        UserError: the settings do not fit the model.
    """
    scheduler = pipeline.scheduler
    if settings.scheduler is not None:
        scheduler = named_scheduler(settings.scheduler, scheduler)
    config = pipeline.config
    chosen = MoHDiTPipeline(
        pipeline.transformer, pipeline.vae, scheduler, config.class_names, config.prediction_type
    )
    chosen.graphs.mode = pipeline.graphs.mode
    guidance = Guidance(
        settings.guidance_scale,
        settings.guidance_channels,
        tuple(settings.guidance_interval),  # type: ignore[arg-type]
        guidance_model,
    )
    chosen.check(guidance, settings.num_inference_steps, step_cache(settings))
    return chosen, guidance


def step_cache(settings: SamplingSettings) -> StepCache | None:
    """Return the cache of ``settings``, ``None`` for none.

    Raises:
        UserError: a setting of a cache is given without a cache.
    """
    if settings.cache is not None:
        return StepCache(settings.cache, settings.cache_threshold, settings.cache_interval)
    for name in ("cache_threshold", "cache_interval"):
        if (value := getattr(settings, name)) is not None:
            raise UserError(f"{name} is {value}, but cache is not set; give cache as well")
    return None


def generate(
    pipeline: MoHDiTPipeline,
    class_labels: Sequence[int | str],
    settings: SamplingSettings,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    towards: tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray] | None = None,
    frames: int = 0,
    batch_size: int = 64,
    batches: Sequence[tuple[int, int]] | None = None,
    pad: bool | None = None,
    decode_batch_size: int | None = None,
    guidance_model: MoHDiTTransformer2DModel | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sample one image per class label, batch by batch.

    Args:
        pipeline: model, autoencoder and noise process. The model may be in training mode. Its mode
            is restored after each batch; a cache of ``settings`` stays enabled until the last one.
        class_labels: N class ids or names.
        settings: steps, guidance, scheduler and seed.
        indices: index of each image (N,); default ``0 … N-1``.
        towards: ``(other_indices, fractions)``, both (N,): start from noise that is this fraction
            (0 … 1) of the way from the noise of the image to the noise of the other index.
        frames: if positive, also return the denoising in this number of frames. The last frame is
            the image.
        batch_size: images per batch. The CPU rounds it up to whole units.
        batches: ranges ``(start, stop)`` of the images to sample, one per batch, each at most
            ``batch_size`` long; default: all images.
        pad: fill the last batch with images that are thrown away, so that all batches have one
            shape (ignored on the CPU); default: if there is more than one batch.
        decode_batch_size: images to decode at once; always one on the CPU.
        guidance_model: weaker model for autoguidance.
        on_step: called after each evaluation of the model as ``on_step(positions, step, latents)``:
            int64 (B,) positions in ``class_labels`` (-1 for padding), the number of the step, and
            latents (B, C, h, w). On the CPU it is called from several threads. An exception that it
            raises ends the sampling.

    Yields:
        ``(positions, images)``: int64 (B,) positions in ``class_labels``, and uint8 (B, H, W, 3) or
        (B, frames, H, W, 3).

    Raises:
        UserError: before any work, for settings or labels that do not fit the model.
    """
    chosen, guidance = use_settings(pipeline, settings, guidance_model)
    requests = np.zeros(len(class_labels), REQUEST)
    requests["label"] = chosen.label_ids(class_labels)
    requests["position"] = np.arange(len(requests))
    requests["index"] = requests["position"] if indices is None else indices
    if towards is not None:
        requests["other"], requests["fraction"] = towards
    on_cpu = runs_in_units(chosen.transformer)
    batch_size = round_up_to_units(chosen.transformer, batch_size)
    if batches is None:
        starts = range(0, len(requests), batch_size)
        batches = [(start, min(start + batch_size, len(requests))) for start in starts]
    pad = len(requests) > batch_size if pad is None else pad

    decoded_at_once = 1 if on_cpu else decode_batch_size
    images_of = partial(
        generate_batch, chosen, guidance, settings, frames, decoded_at_once, on_step
    )

    def sample_batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        models, cached = (chosen.transformer, guidance_model), ExitStack()
        try:
            with evaluation_mode(*models), torch.no_grad():  # MagCache first measures the model
                steps = settings.num_inference_steps
                cached.enter_context(caching(chosen, step_cache(settings), guidance, steps))
            for start, stop in batches:
                batch = requests[start:stop]
                with evaluation_mode(*models), torch.no_grad():
                    if on_cpu:
                        images = run_in_units(chosen.transformer, images_of, batch)
                    else:
                        padding = np.zeros(batch_size - len(batch) if pad else 0, REQUEST)
                        padding["position"] = -1
                        images = images_of(np.concatenate([batch, padding]))[: len(batch)]
                yield np.arange(start, stop), images
        finally:
            cached.close()
            chosen.graphs.release()

    return sample_batches()


def generate_batch(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    frames: int,
    decode_batch_size: int | None,
    on_step: OnStep | None,
    requests: np.ndarray,
) -> np.ndarray:
    """Sample one batch at once: uint8 (B, H, W, 3), or (B, frames, H, W, 3)."""
    kept: list[Tensor] = []
    kept_steps: set[int] = set()
    if frames:
        steps = count_steps(pipeline, settings)
        kept_steps = set(np.linspace(0, steps - 1, frames).round().astype(int).tolist())

    def callback(pipeline: Any, step: int, timestep: Tensor, tensors: dict) -> None:
        if step in kept_steps:
            kept.append(tensors["latents"])
        if on_step is not None:
            on_step(requests["position"], step, tensors["latents"])

    latents = denoise_batch(pipeline, guidance, settings, requests, callback)
    images = to_uint8(pipeline.decode(latents, decode_batch_size))
    if not frames:
        return images
    states = [decode_noisy(pipeline, state, decode_batch_size) for state in kept[:-1]]
    return np.stack([*states, images], axis=1)


def count_steps(pipeline: MoHDiTPipeline, settings: SamplingSettings) -> int:
    """Return the number of model evaluations per image; some samplers need two per step."""
    return len(prepare_scheduler(pipeline.scheduler, settings.num_inference_steps).timesteps)


def decode_noisy(
    pipeline: MoHDiTPipeline, latents: Tensor, decode_batch_size: int | None = None
) -> np.ndarray:
    """Decode noisy latents (B, C, h, w) for display: uint8 (B, H, W, 3)."""
    # Latents of early steps may be far larger than any that the autoencoder was trained on.
    scale = latents.std(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return to_uint8(pipeline.decode(latents / scale, decode_batch_size))


def denoise_batch(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    requests: np.ndarray,
    callback: Any = None,
) -> Tensor:
    """Sample the latents (B, C, h, w) of one batch at once, without decoding them."""
    device, seed = pipeline.transformer.device, settings.seed
    request = {name: torch.from_numpy(requests[name].copy()) for name in requests.dtype.names or ()}
    noise = ImageNoise(seed, request["index"], device)
    if request["fraction"].any():
        noise = BlendedNoise(seed, request["index"], device, request["other"], request["fraction"])
    latents = pipeline.prepare_latents(len(requests), noise)
    labels = request["label"].to(device)
    return pipeline.denoise(
        latents, labels, guidance, settings.num_inference_steps, noise, callback
    )


def runs_in_units(transformer: MoHDiTTransformer2DModel) -> bool:
    """Return whether this model samples in units, so that bytes do not depend on the batch."""
    return transformer.device.type == "cpu"


def images_per_unit(transformer: MoHDiTTransformer2DModel) -> int:
    """Return how many images form a unit on the CPU; the batch size does not matter."""
    config = transformer.config
    return max(1, TOKENS_PER_UNIT // (config.sample_size // config.patch_size) ** 2)


def round_up_to_units(transformer: MoHDiTTransformer2DModel, batch_size: int) -> int:
    """Round a batch size up to a multiple of the unit size (CPU only)."""
    unit = images_per_unit(transformer) if runs_in_units(transformer) else 1
    return -(-batch_size // unit) * unit


def plan_units(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Distribute images over units of ``size`` rows, image i in row ``i % size``.

    Returns:
        For each unit an int64 (size,) array of positions in ``indices``, -1 for an empty row.
    """
    rows = indices % size
    unit = np.tril(rows[:, None] == rows, -1).sum(1)  # number of earlier images in the same row
    units = np.full((unit.max(initial=-1) + 1, size), -1)
    units[unit, rows] = np.arange(len(indices))
    return list(units)


def run_in_units(
    transformer: MoHDiTTransformer2DModel,
    compute: Callable[[np.ndarray], np.ndarray],
    requests: np.ndarray,
) -> np.ndarray:
    """Call ``compute`` on each unit of a batch, one thread per unit; returns an array (B, …)."""
    size = images_per_unit(transformer)

    @torch.no_grad()
    def run(unit: np.ndarray) -> np.ndarray:
        # An empty row computes an image of class 0, which is thrown away.
        filled = unit >= 0
        padded = np.zeros(size, REQUEST)
        padded["index"], padded["position"] = np.arange(size), -1
        padded[filled] = requests[unit[filled]]
        return compute(padded)[filled]

    units, threads = plan_units(requests["index"], size), torch.get_num_threads()
    # diffusers' caches are stored in the model, so units cannot use them at the same time.
    workers = 1 if transformer.is_cache_enabled else min(threads, len(units))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = np.concatenate(list(pool.map(run, units)))
    finally:
        torch.set_num_threads(threads)  # the workers' call also set the default of new threads
    result = np.empty_like(parts)
    result[np.concatenate([unit[unit >= 0] for unit in units])] = parts
    return result


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert images (B, 3, H, W) in -1 … 1 to uint8 (B, H, W, 3), rounding to the nearest."""
    scaled = ((images / 2 + 0.5) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def evaluation_mode(*models: MoHDiTTransformer2DModel | None) -> Iterator[None]:
    """Put models in evaluation mode inside the block; restore their mode on exit.

    On the CPU this also selects the reference attention backend for models whose units hold several
    images. The gathered backend pads each image to the longest list of queries in its unit. Its
    products would have other shapes, and round differently, beside other images.
    """
    with ExitStack() as restore:
        for model in filter(None, models):
            if model.training:
                restore.callback(model.train)
                model.eval()
            if runs_in_units(model) and images_per_unit(model) > 1:
                for layer in model.modules():
                    if isinstance(layer, MoHAttention):
                        restore.callback(
                            setattr, layer, "attention_backend", layer.attention_backend
                        )
                        layer.attention_backend = "reference"
        yield
