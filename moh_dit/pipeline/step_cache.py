"""Skip transformer blocks in some denoising steps, by the cache hooks of diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor

from ..common.compat import without_compiled_call
from ..common.errors import UserError
from ..diffusion.noise import ImageNoise
from ..kernels.backends import check_choice
from ..model.transformer import MoHDiTTransformer2DModel
from .forward_graphs import ForwardGraphs
from .guidance import Guidance

MEASURED_IMAGES = 4  # to measure the ratios of "magcache"
# The setting of each cache.
CACHES = {"first-block": "threshold", "taylorseer": "interval", "magcache": "threshold"}


@dataclass(frozen=True)
class StepCache:
    """A cache that approximates the transformer in some steps from earlier steps.

    Attributes:
        name: ``"first-block"`` (ParaAttention) skips the other blocks if the output of the first
            block has changed little since the last computed step. ``"magcache"`` (arXiv 2506.09045)
            skips all blocks while a measured error stays small. Both then add what the skipped
            blocks added before. ``"taylorseer"`` (arXiv 2503.06923) computes one step of
            ``interval`` and extrapolates the output of the last block linearly in the others.
        threshold: error up to which "first-block" (default: 0.05) and "magcache" (0.06) skip.
        interval: "taylorseer" computes one of this number of steps (default: 5).
    """

    name: str
    threshold: float | None = None
    interval: int | None = None

    def check(self, model: MoHDiTTransformer2DModel, guidance: Guidance) -> None:
        """Raise ``UserError`` for values that are invalid, or do not fit the model or guidance."""
        check_choice("cache", self.name, tuple(CACHES))
        for setting, least in (("threshold", 0), ("interval", 1)):
            value = getattr(self, setting)
            if value is not None and setting != CACHES[self.name]:
                raise UserError(
                    f"cache_{setting} is {value}, but the cache {self.name} has no {setting}; give "
                    f"cache_{CACHES[self.name]}, or choose another cache"
                )
            if value is not None and value < least:
                raise UserError(f"cache_{setting} is {value}; it must be at least {least}")
        if len(model.blocks) < 2:
            raise UserError("a cache needs a model with at least two blocks; leave out cache")
        if self.name != "first-block" and guidance.is_limited:
            raise UserError(
                f"the cache {self.name} counts steps, so it cannot be combined with a "
                "guidance_interval; use the cache first-block, or leave out guidance_interval"
            )

    def config(self, model: MoHDiTTransformer2DModel, ratios: Sequence[float] = ()) -> Any:
        """Return the configuration for ``model.enable_cache`` of diffusers.

        Args:
            model: the model that will be cached.
            ratios: ``values`` of :class:`MagnitudeRatios`, for "magcache".
        """
        chosen = {"threshold": self.threshold} if self.threshold is not None else {}
        if self.name == "first-block":
            return FirstBlockCacheConfig(**chosen)
        if self.name == "magcache":
            steps = len(ratios)
            return MagCacheConfig(**chosen, num_inference_steps=steps, mag_ratios=list(ratios))
        last = len(model.blocks) - 1
        return TaylorSeerCacheConfig(
            cache_interval=self.interval or TaylorSeerCacheConfig.cache_interval,
            taylor_factors_dtype=model.dtype,
            cache_identifiers=[rf"blocks\.{last}"],
            # In extrapolated steps, the other blocks return zeros that nothing reads.
            skip_predict_identifiers=[rf"blocks\.(?!{last}$)\d+"],
        )


@contextmanager
def caching(
    pipeline: Any, cache: StepCache | None, guidance: Guidance, num_inference_steps: int
) -> Iterator[None]:
    """Enable a cache inside the block, for the model of a pipeline and that of autoguidance.

    "magcache" first samples a few images without the cache, to measure its ratios.

    Args:
        pipeline: a :class:`~moh_dit.pipeline.pipeline.MoHDiTPipeline`.
        cache: the cache, checked; ``None`` for none.
        guidance, num_inference_steps: those of the images.
    """
    if cache is None:
        yield
        return
    models = [pipeline.transformer, *filter(None, [guidance.model])]
    measured = [MagnitudeRatios(model) for model in models]
    with ExitStack() as active:
        if cache.name == "magcache":
            with ExitStack() as measuring:
                for each in measured:
                    measuring.enter_context(each)
                sample_for_ratios(pipeline, guidance, num_inference_steps)
        for model, ratios in zip(models, measured, strict=True):
            config = cache.config(model, ratios.values)
            active.enter_context(cached_blocks(model, config, pipeline.graphs))
        yield


@torch.no_grad()
def sample_for_ratios(pipeline: Any, guidance: Guidance, num_inference_steps: int) -> None:
    """Sample latents of a few fixed images, without compilation and CUDA graphs."""
    mode, pipeline.graphs.mode = pipeline.graphs.mode, False
    device, classes = pipeline.transformer.device, pipeline.transformer.config.num_classes
    labels = torch.arange(MEASURED_IMAGES, device=device) * classes // MEASURED_IMAGES
    noise = ImageNoise(0, range(MEASURED_IMAGES), device)
    try:
        with torch.compiler.set_stance("force_eager"):
            latents = pipeline.prepare_latents(MEASURED_IMAGES, noise)
            pipeline.denoise(latents, labels, guidance, num_inference_steps, noise)
    finally:
        pipeline.graphs.mode = mode


@contextmanager
def cached_blocks(
    model: MoHDiTTransformer2DModel, config: Any, graphs: ForwardGraphs
) -> Iterator[None]:
    """Enable a cache of diffusers inside the block; blocks that are computed run as CUDA graphs."""
    if model.is_cache_enabled:
        raise UserError("the transformer already has a cache; call its disable_cache() first")
    with ExitStack() as restore:
        for block in model.blocks:
            forward = block.forward
            # Hooks run as Python code, so only the method that they wrap is compiled.
            if restore.enter_context(without_compiled_call(block)):
                forward = torch.compile(forward, dynamic=False)
            if "forward" in vars(block):
                restore.callback(setattr, block, "forward", block.forward)
            else:
                restore.callback(delattr, block, "forward")
            block.forward = partial(graphs, block, function=forward)
        model.enable_cache(config)
        restore.callback(model.disable_cache)
        yield


class MagnitudeRatios:
    """Measures the ratios that MagCache needs (arXiv 2506.09045, eq. 4), as a context manager.

    Attributes:
        values: for each evaluation of the model inside the block, the norm of what all blocks add
            to a token, divided by that of the evaluation before, averaged over tokens and images.
            The first ratio is 1.
    """

    def __init__(self, model: MoHDiTTransformer2DModel):
        self.values: list[float] = []
        self.norms: Tensor | None = None
        self.blocks = model.blocks

    def __enter__(self) -> Self:
        self.hooks = [
            self.blocks[0].register_forward_pre_hook(self._before),
            self.blocks[-1].register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, block: Any, arguments: tuple) -> None:
        self.input = arguments[0]

    def _after(self, block: Any, arguments: tuple, output: Tensor) -> None:
        norms = torch.linalg.vector_norm((output - self.input).float(), dim=-1)
        before = norms if self.norms is None else self.norms
        self.values.append((norms / (before + 1e-8)).mean().item())
        self.norms = norms
