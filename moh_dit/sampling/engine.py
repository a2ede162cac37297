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
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..diffusion.noise import BlendedNoise, ImageNoise
from ..diffusion.samplers import named_scheduler, prepare_scheduler
from ..model.attention import MoHAttention
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import Guidance, MoHDiTPipeline
from .config import SamplingSettings

# Fewer tokens at once leave a small model waiting for Python; more make a lone image wait for the
# empty places of its unit.
TOKENS_PER_UNIT = 256

# ``position``: which of the asked images it is, -1 for one that only fills up a batch.
REQUEST = np.dtype(
    [("label", "i8"), ("index", "i8"), ("other", "i8"), ("fraction", "f8"), ("position", "i8")]
)
OnStep: TypeAlias = Callable[[np.ndarray, int, Tensor], None]


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
    indices: Sequence[int] | np.ndarray | None = None,
    towards: tuple[Sequence[int], Sequence[float]] | None = None,
    frames: int = 0,
    batch_size: int = 64,
    pad: bool | None = None,
    decode_batch_size: int | None = None,
    guidance_model: MoHDiTTransformer2DModel | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of ``class_labels``, batch by batch.

    Args:
        pipeline: model, autoencoder and trained process; left as it is, whatever mode the model
            is in.
        class_labels: ids or names, N of them.
        settings: steps, guidance, scheduler and seed.
        indices: image number of each label; ``0 … N-1`` unless given.
        towards: N further image numbers and N fractions in 0 … 1: start from noise that far on
            the way from the one image's to the other's.
        frames: also show the way there, in so many frames with the image as the last.
        batch_size: images at once; on the CPU rounded up to whole units.
        pad: fill up the last batch, so that all have one shape (not on the CPU); where there is
            more than one batch unless given.
        decode_batch_size: images decoded at once; on the CPU always one.
        guidance_model: the weaker model of autoguidance.
        on_step: called after each evaluation of the model as ``f(positions, step, latents)``:
            int64 (B,), which of the N the rows are (-1: none, a filler), the number of the step,
            and (B, C, h, w); on the CPU from several threads. What it raises ends the work.

    Yields:
        ``(positions, images)``: int64 (B,), which of the N these are, and uint8 (B, H, W, 3), or
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
    on_cpu = works_in_units(chosen.transformer)
    batch_size = whole_units(chosen.transformer, batch_size)
    pad = len(requests) > batch_size if pad is None else pad

    def images_of(requests: np.ndarray) -> np.ndarray:
        decoded_at_once = 1 if on_cpu else decode_batch_size
        return render(chosen, guidance, settings, requests, frames, decoded_at_once, on_step)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            with evaluation_mode(chosen.transformer, guidance_model), torch.no_grad():
                if on_cpu:
                    images = run_units(chosen.transformer, images_of, batch)
                elif pad:
                    filler = np.zeros(batch_size - len(batch), REQUEST)
                    filler["position"] = -1
                    images = images_of(np.concatenate([batch, filler]))[: len(batch)]
                else:
                    images = images_of(batch)
            yield np.arange(start, start + len(batch)), images

    return batches()


def render(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    requests: np.ndarray,
    frames: int = 0,
    decode_batch_size: int | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """One batch as it is: uint8 (B, H, W, 3), or (B, frames, H, W, 3)."""
    shown: list[Tensor] = []
    wanted: set[int] = set()
    if frames:
        steps = count_steps(pipeline, settings)
        wanted = set(np.linspace(0, steps - 1, frames).round().astype(int).tolist())

    def callback(pipeline: Any, step: int, timestep: Tensor, tensors: dict) -> None:
        if step in wanted:
            shown.append(tensors["latents"])
        if on_step is not None:
            on_step(requests["position"], step, tensors["latents"])

    latents = sample_latents(pipeline, guidance, settings, requests, callback)
    images = to_uint8(pipeline.decode(latents, decode_batch_size))
    if not frames:
        return images
    states = [decode_state(pipeline, state, decode_batch_size) for state in shown[:-1]]
    return np.stack([*states, images], axis=1)


def count_steps(pipeline: MoHDiTPipeline, settings: SamplingSettings) -> int:
    """Evaluations of the model on the way to an image: some samplers take two a step."""
    return len(prepare_scheduler(pipeline.scheduler, settings.num_inference_steps).timesteps)


def decode_state(
    pipeline: MoHDiTPipeline, latents: Tensor, decode_batch_size: int | None = None
) -> np.ndarray:
    """A state of the process (B, C, h, w) to look at: uint8 (B, H, W, 3)."""
    # Early states may be far larger than what the autoencoder knows.
    scale = latents.std(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return to_uint8(pipeline.decode(latents / scale, decode_batch_size))


def sample_latents(
    pipeline: MoHDiTPipeline,
    guidance: Guidance,
    settings: SamplingSettings,
    requests: np.ndarray,
    callback: Any = None,
) -> Tensor:
    """Latents (B, C, h, w) of one batch, as it is."""
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


def works_in_units(transformer: MoHDiTTransformer2DModel) -> bool:
    """Whether images are computed so that their bytes are free of the batch."""
    return transformer.device.type == "cpu"


def images_per_unit(transformer: MoHDiTTransformer2DModel) -> int:
    """How many images the CPU computes together, whatever the batch size."""
    config = transformer.config
    return max(1, TOKENS_PER_UNIT // (config.sample_size // config.patch_size) ** 2)


def whole_units(transformer: MoHDiTTransformer2DModel, batch_size: int) -> int:
    """The batch size that leaves no place of a unit empty; as it is where there are no units."""
    unit = images_per_unit(transformer) if works_in_units(transformer) else 1
    return -(-batch_size // unit) * unit


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
    transformer: MoHDiTTransformer2DModel,
    compute: Callable[[np.ndarray], np.ndarray],
    requests: np.ndarray,
) -> np.ndarray:
    """``compute`` for a batch, unit by unit on single threads: an array (B, …)."""
    size = images_per_unit(transformer)

    @torch.no_grad()
    def run(unit: np.ndarray) -> np.ndarray:
        # An empty place computes image number ``place`` of class 0, and is thrown away.
        filled = unit >= 0
        asked = np.zeros(size, REQUEST)
        asked["index"], asked["position"] = np.arange(size), -1
        asked[filled] = requests[unit[filled]]
        return compute(asked)[filled]

    units, threads = plan_units(requests["index"], size), torch.get_num_threads()
    # diffusers' caches live in the model: units that share them take turns.
    workers = 1 if transformer.is_cache_enabled else min(threads, len(units))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = np.concatenate(list(pool.map(run, units)))
    finally:
        torch.set_num_threads(threads)  # the default of threads to come
    result = np.empty_like(parts)
    result[np.concatenate([unit[unit >= 0] for unit in units])] = parts
    return result


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in -1 … 1 → uint8 (B, H, W, 3), rounded to the nearest."""
    scaled = ((images / 2 + 0.5) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def evaluation_mode(*models: MoHDiTTransformer2DModel | None) -> Iterator[None]:
    """Put models in evaluation mode, and back.

    On the CPU also let every image attend alone: the gathered backend pads an image's lists of
    queries to its neighbours', and products of other shapes round differently.
    """
    given = [model for model in models if model is not None]
    training = [model for model in given if model.training]
    layers = [
        (layer, layer.attention_backend)
        for model in given
        for layer in model.modules()
        if isinstance(layer, MoHAttention) and works_in_units(model)
        if images_per_unit(model) > 1
    ]
    for model in training:
        model.eval()
    for layer, _ in layers:
        layer.attention_backend = "reference"
    try:
        yield
    finally:
        for model in training:
            model.train()
        for layer, backend in layers:
            layer.attention_backend = backend
