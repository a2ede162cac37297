"""Continue-tuning (MoH, arXiv 2410.11842, §4.4): a dense model becomes MoH, then trains on.

    model = dense_to_moh(dense, MoHSettings(num_shared_heads=3, num_active_routed_heads=2))

No weight is drawn at random: heads are put in another order, the shared ones first, and the router
either has no parameters or is fitted to the one that has none. With every head active the model
computes what the dense one did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args, get_type_hints

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..autoencoder import downsampling_factor, latent_scaling, sample_posterior
from ..common.errors import UserError
from ..data.images import open_images
from ..data.latents import encode_images
from ..diffusion.objectives import FlowObjective, NoiseObjective, Objective
from ..model.attention import MoHAttention
from ..model.routing import check_head_plan
from ..model.transformer import DiTBlock, HeadPlan, MoHDiTTransformer2DModel, per_layer
from ..pipeline.pipeline import MoHDiTPipeline
from .attention import attention_to_moh, fit_routers, head_importance

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MoHSettings:
    """How a dense model becomes MoH."""

    num_shared_heads: HeadPlan
    """Shared heads s, one number or one per layer; none for a layer that stays dense."""
    num_active_routed_heads: HeadPlan
    """Routed heads k that each token activates, one number or one per layer."""
    router: Literal["query_norm", "learned"] = "query_norm"
    """query_norm: no parameters (MoH §4.4). learned: MoH's own, fitted to select as that one does;
    needs data."""
    shared_heads: Literal["first", "random", "importance"] = "first"
    """Which heads become shared: the first, a random choice, or those that add most to the residual
    stream, by the mean of ‖o_i W_proj,i‖₂ over the tokens of the data (arXiv 2004.10102)."""
    seed: int = 0
    """Seed of the random choice."""


@torch.no_grad()
def dense_to_moh(
    model: MoHDiTTransformer2DModel, settings: MoHSettings, data: Sequence[Inputs] | None = None
) -> MoHDiTTransformer2DModel:
    """Turn a dense model into MoH, in place, and return it.

    Args:
        model: a model without routers; its weights are kept, heads reordered within layers.
        settings: the plan, the router and the choice of shared heads.
        data: inputs of the model as it meets them in training (see :func:`noisy_batches`), for
            ``shared_heads="importance"`` and ``router="learned"``.

    Raises:
        UserError: a model that is MoH already, a plan that does not add up, or data missing. The
            model is then as it was.
    """
    for name in ("router", "shared_heads"):
        allowed = get_args(get_type_hints(MoHSettings)[name])
        if getattr(settings, name) not in allowed:
            raise UserError(
                f"{name} is {getattr(settings, name)!r}; choose one of {', '.join(allowed)}"
            )
    dense = [cast(DiTBlock, block).attn for block in model.blocks]
    plans = check_plans(dense, settings)
    for name, value in (("shared_heads", "importance"), ("router", "learned")):
        if getattr(settings, name) == value and not data:
            raise UserError(
                f"{name} {value!r} is measured on data, and none was given; give some, or choose "
                f"{'first or random' if name == 'shared_heads' else 'query_norm'}"
            )

    training = model.training
    model.eval()

    def run() -> None:
        device = model.pos_embed.device
        for inputs in data or ():
            model(*(tensor.to(device) for tensor in inputs))

    orders = shared_first(dense, [shared for shared, _ in plans], settings, run)
    layers = [
        attention_to_moh(layer, *plan, settings.router, order)
        for layer, plan, order in zip(dense, plans, orders, strict=True)
    ]
    if settings.router == "learned":
        fit_routers(dense, layers, run)
    model.train(training)
    for block, layer in zip(model.blocks, layers, strict=True):
        cast(DiTBlock, block).attn = layer.train(training)
    shared, active = (list(values) for values in zip(*plans, strict=True))
    changed = dict(num_shared_heads=shared, num_active_routed_heads=active, router=settings.router)
    defaults = set(model.config.get("_use_default_values", [])) - changed.keys()
    model.register_to_config(**changed, _use_default_values=sorted(defaults))
    return model


def check_plans(
    layers: Sequence[MoHAttention], settings: MoHSettings
) -> list[tuple[int | None, int | None]]:
    """(s, k) of each layer, ``(None, None)`` of those that stay dense, or a ``UserError``."""
    if any(layer.num_shared_heads is not None for layer in layers):
        raise UserError("the model is MoH already; continue-tuning starts from a dense one")
    shared = per_layer("num_shared_heads", settings.num_shared_heads, len(layers))
    active = per_layer("num_active_routed_heads", settings.num_active_routed_heads, len(layers))
    if all(s is None for s in shared):
        raise UserError("num_shared_heads is not set in any layer; give 0 for none shared")
    for i, (layer, s, k) in enumerate(zip(layers, shared, active, strict=True)):
        try:
            check_head_plan(layer.qkv.in_features, layer.num_heads, s, k, layer.head_dim)
        except UserError as error:
            raise UserError(f"layer {i}: {error}") from None
    return [(s, None if s is None else k or 0) for s, k in zip(shared, active, strict=True)]


def shared_first(
    layers: Sequence[MoHAttention],
    shared: Sequence[int | None],
    settings: MoHSettings,
    run: Callable[[], None],
) -> list[Tensor]:
    """The new order of the heads of each layer (h,): shared ones, then the others, as they were."""
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.shared_heads == "importance":
        rankings = [scores.argsort(descending=True) for scores in head_importance(layers, run)]
    elif settings.shared_heads == "random":
        rankings = [torch.randperm(layer.num_heads, generator=generator) for layer in layers]
    else:
        rankings = [torch.arange(layer.num_heads) for layer in layers]
    return [
        torch.cat([ranking[: s or 0].sort().values, ranking[s or 0 :].sort().values])
        for ranking, s in zip(rankings, shared, strict=True)
    ]


@torch.no_grad()
def noisy_batches(
    pipeline: MoHDiTPipeline,
    source: str,
    num_images: int = 512,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Inputs]:
    """Inputs of the pipeline's model as training would draw them: noisy latents, times, labels.

    Args:
        pipeline: model, autoencoder and noise process.
        source: any data set of ``moh_dit.data`` ("digits", a folder of classes, …).
        num_images: images drawn from it, each with its own time and noise; all if it has fewer.
        batch_size: images in each tuple ``(noisy latents, times, labels)``.
        seed: of the draw.

    Raises:
        UserError: unreadable data, or classes that the model does not know.
    """
    model, vae = pipeline.transformer, pipeline.vae
    image_size = downsampling_factor(vae) * model.config.sample_size
    images = open_images(source, image_size, progress=False)
    if len(images.class_names) > model.config.num_classes:
        raise UserError(
            f"{source} has {len(images.class_names)} classes, the model knows "
            f"{model.config.num_classes}"
        )
    latents = encode_images(images, vae, progress=False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(latents), generator=generator)[:num_images].tolist()
    objective = objective_of(pipeline.scheduler)
    batches = []
    for start in range(0, len(rows), batch_size):
        moments, labels = latents.__getitems__([(i, False) for i in rows[start:][:batch_size]])
        shape = len(labels), moments.shape[1] // 2, *moments.shape[2:]
        posterior_noise, noise = torch.randn(2, *shape, generator=generator)
        clean = sample_posterior(moments, posterior_noise, latent_scaling(vae))
        times = objective.draw_times(len(labels), generator)
        batches.append((objective.add_noise(clean, noise, times), times, labels))
    return batches


def objective_of(scheduler: object) -> Objective:
    """The training objective whose samples a scheduler draws."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowObjective()
    config = scheduler.config  # type: ignore[attr-defined]
    return NoiseObjective(config.prediction_type, config.variance_type == "learned_range")
