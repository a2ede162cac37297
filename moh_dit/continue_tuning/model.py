"""Make a MoH model from a dense one, for continue-tuning (MoH, arXiv 2410.11842, §4.4).

    model = dense_to_moh(dense, MoHSettings(num_shared_heads=3, num_active_routed_heads=2))

The weights stay those of the dense model. Heads are reordered within a layer, shared heads first,
and the router has no parameters or is fitted to the one without. With every head active, the model
computes the same as the dense one.
"""

from collections.abc import Callable, Sequence
from typing import cast, get_args, get_type_hints

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..autoencoder import downsampling_factor, latent_scaling, sample_posterior
from ..common.compat import change_model_config
from ..common.errors import UserError
from ..data.images import open_images
from ..data.latents import encode_images
from ..diffusion.objectives import FlowObjective, NoiseObjective, Objective
from ..kernels.backends import check_choice
from ..model.attention import MoHAttention
from ..model.blocks import DiTBlock
from ..model.routing import check_head_plan
from ..model.transformer import MoHDiTTransformer2DModel, per_layer
from ..pipeline.pipeline import MoHDiTPipeline
from .attention import attention_to_moh, fit_routers, head_importance
from .config import MoHSettings

Inputs = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def dense_to_moh(
    model: MoHDiTTransformer2DModel, settings: MoHSettings, data: Sequence[Inputs] | None = None
) -> MoHDiTTransformer2DModel:
    """Turn a dense model into a MoH model, in place, and return it.

    Args:
        model: a model without routers.
        settings: number of heads, router and choice of shared heads.
        data: inputs of the model as in training (see :func:`noisy_batches`); required for
            ``shared_heads="importance"`` and ``router="learned"``.

    Raises:
        UserError: the model has routers already, the numbers of heads do not add up, or data is
            missing. The model is then unchanged.
    """
    for name in ("router", "shared_heads"):
        check_choice(name, getattr(settings, name), get_args(get_type_hints(MoHSettings)[name]))
    dense = [cast(DiTBlock, block).attn for block in model.blocks]
    plans = _layer_plans(dense, settings)
    for name, value in (("shared_heads", "importance"), ("router", "learned")):
        if getattr(settings, name) == value and not data:
            raise UserError(
                f"{name} {value!r} needs data, but none is given; give data, or choose "
                f"{'first or random' if name == 'shared_heads' else 'query_norm'}"
            )

    training = model.training
    model.eval()

    def run() -> None:
        device = model.pos_embed.device
        for inputs in data or ():
            model(*(tensor.to(device) for tensor in inputs))

    orders = _new_head_orders(dense, [shared for shared, _ in plans], settings, run)
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
    change_model_config(
        model, num_shared_heads=shared, num_active_routed_heads=active, router=settings.router
    )
    return model


def _layer_plans(
    layers: Sequence[MoHAttention], settings: MoHSettings
) -> list[tuple[int | None, int | None]]:
    """Return (s, k) of each layer; ``(None, None)`` for a layer that stays dense.

    Raises:
        UserError: the model has routers already, or the numbers of heads do not add up.
    """
    if any(layer.num_shared_heads is not None for layer in layers):
        raise UserError("the model has routers already; give a dense model")
    shared = per_layer("num_shared_heads", settings.num_shared_heads, len(layers))
    active = per_layer("num_active_routed_heads", settings.num_active_routed_heads, len(layers))
    if all(s is None for s in shared):
        raise UserError("num_shared_heads is not set for any layer; 0 means no shared heads")
    for i, (layer, s, k) in enumerate(zip(layers, shared, active, strict=True)):
        try:
            check_head_plan(layer.qkv.in_features, layer.num_heads, s, k, layer.head_dim)
        except UserError as error:
            raise UserError(f"layer {i}: {error}") from None
    return [(s, None if s is None else k or 0) for s, k in zip(shared, active, strict=True)]


def _new_head_orders(
    layers: Sequence[MoHAttention],
    shared: Sequence[int | None],
    settings: MoHSettings,
    run: Callable[[], None],
) -> list[Tensor]:
    """Return the new order of the heads of each layer, int64 (h,): shared heads first.

    Shared heads keep their order, and so do the other heads.
    """
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
    """Draw inputs of the pipeline's model as in training.

    Args:
        pipeline: model, autoencoder and noise process.
        source: a data set, as training accepts it ("digits", a folder of classes, …).
        num_images: number of images to draw, at most all. Each has its own timestep and noise.
        batch_size: images per batch.
        seed: seed of the choice of images, timesteps and noise.

    Returns:
        Batches ``(noisy latents (B, C, h, w), timesteps (B,), labels (B,))``.

    Raises:
        UserError: the data cannot be read, or has more classes than the model.
    """
    model, vae = pipeline.transformer, pipeline.vae
    image_size = downsampling_factor(vae) * model.config.sample_size
    images = open_images(source, image_size, progress=False)
    if len(images.class_names) > model.config.num_classes:
        raise UserError(
            f"{source} has {len(images.class_names)} classes, but the model has only "
            f"{model.config.num_classes}; give data with the classes of the model"
        )
    latents = encode_images(images, vae, progress=False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(latents), generator=generator)[:num_images].tolist()
    objective = _training_objective(pipeline.scheduler)
    batches = []
    for start in range(0, len(rows), batch_size):
        moments, labels = latents.__getitems__([(i, False) for i in rows[start:][:batch_size]])
        shape = len(labels), model.config.in_channels, *moments.shape[2:]
        posterior_noise, noise = torch.randn(2, *shape, generator=generator)
        clean = sample_posterior(moments, posterior_noise, latent_scaling(vae))
        times = objective.draw_times(len(labels), generator)
        batches.append((objective.add_noise(clean, noise, times), times, labels))
    return batches


def _training_objective(scheduler: object) -> Objective:
    """Return the training objective of a model that this scheduler samples from."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowObjective()
    config = scheduler.config  # type: ignore[attr-defined]
    return NoiseObjective(config.prediction_type, config.variance_type == "learned_range")
