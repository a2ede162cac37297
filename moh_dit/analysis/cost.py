"""Estimate parameters, FLOPs, memory and GPU-hours of a training run without running it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..autoencoder import EMBEDDED, PIXELS, layout_of_config
from ..checkpoints.runs import resolve_checkpoint
from ..common.cli import load_config
from ..common.errors import UserError
from ..common.paths import choose_autoencoder
from ..common.version import __version__
from ..data.latents import open_latents
from ..model.blocks import DiTBlock
from ..model.flops import PEAKS, count_flops, peak_of, skipped_flops, skipped_heads
from ..model.transformer import MoHDiTTransformer2DModel
from ..training.config import TrainConfig
from ..training.setup import create_model
from .config import CostConfig
from .memory_estimate import activation_bytes, state_bytes

GIB = 2**30
DIGITS_CLASSES, IMAGENET_CLASSES = 10, 1000
# Settings of the run that the result repeats.
REPEATED_SETTINGS = ("batch_size", "num_steps", "mixed_precision", "compile",
                     "gradient_checkpointing")  # fmt: skip
PUBLISHED_LATENTS = (4, 8)  # latent channels; side of the image over side of the latent
# Parts of the model, with strings in the names of their parameters. The first match counts.
PARTS = {
    "routers": (".wg",),
    "attention": (".attn.",),
    "MLP": (".mlp.fc",),
    "adaLN": ("adaLN_modulation",),
    "labels": ("y_embedder",),
    "patches, timestep, positions": ("x_embedder", "t_embedder", "pos_embed"),
    "output": ("final_layer.linear",),
}


def estimate_cost(config: CostConfig) -> dict[str, Any]:
    """Estimate the cost of ``config``.

    Returns:
        A dictionary for JSON with counts of parameters, FLOPs, bytes and hours.

    Raises:
        UserError: settings contradict each other or do not determine the model.
    """
    config.check_paths()
    train = training_settings(config)
    model, notes = build_on_meta(config, train)
    train.check(config.num_gpus)
    micro_batch = train.batch_size // (config.num_gpus * train.gradient_accumulation_steps)
    flops = count_flops(model)
    per_image, skipped = sum(flops.values()), skipped_flops(model)
    averages = len(train.ema_decays) + len(train.ema_power_stds)
    state = state_bytes(model, averages)
    activations, one_more = (
        activation_bytes(
            model,
            images,
            autocast=train.mixed_precision != "no",
            compiled=train.compile,
            fused_gates=True,  # in the Triton kernels, which run on a GPU
            checkpointing=train.gradient_checkpointing,
        )
        for images in (micro_batch, micro_batch + 1)
    )
    peak = train.peak_tflops and train.peak_tflops * 1e12
    peak = peak or peak_of(config.gpu, train.mixed_precision, train.allow_tf32)
    if peak is None:
        raise UserError(
            f"gpu {config.gpu!r}: its peak is unknown; give one of {', '.join(PEAKS)}, or set "
            "peak_tflops"
        )
    images = train.batch_size * train.num_steps
    layers = [block.attn for block in model.blocks if isinstance(block, DiTBlock)]
    heads = sum(layer.num_heads for layer in layers)
    return {
        "version": __version__,
        "notes": notes,
        "model": {
            "tokens": (model.config.sample_size // model.config.patch_size) ** 2,
            "width": model.config.hidden_size,
            "layers": len(layers),
            "routed_layers": len(model.routed_layers),
            "heads": heads,
            "active_heads": heads - sum(map(skipped_heads, layers)),
        },
        "parameters": {"total": model.num_parameters(), **parameters_by_part(model)},
        "flops_per_image": {"total": per_image, **flops, "saved_by_skipped_heads": skipped},
        "memory_per_gpu": {
            "batch": micro_batch,
            "total": sum(state.values()) + activations,
            "activations": activations,
            "activations_per_image": one_more - activations,
            **state,
        },
        "training": {
            **{name: getattr(train, name) for name in REPEATED_SETTINGS},
            "gpu": config.gpu if not train.peak_tflops else "given peak",
            "num_gpus": config.num_gpus,
            "peak_flops": peak,
            "mfu": config.mfu,
            "flops": 3 * per_image * images,
            "images_per_second_per_gpu": config.mfu * peak / (3 * per_image),
            "gpu_hours": 3 * per_image * images / (config.mfu * peak) / 3600,
        },
    }


def print_cost(config: CostConfig) -> None:
    """Print the estimated cost of a configuration as a table, or as JSON."""
    cost = estimate_cost(config)
    print(json.dumps(cost, indent=1) if config.json else format_cost(cost))


def training_settings(config: CostConfig) -> TrainConfig:
    """Return the settings of the run: given values, then the checkpoint's, then the defaults."""
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    given = {name: values[name] for name in config.FROM_CHECKPOINT if values[name] is not None}
    base = TrainConfig()
    if config.checkpoint is not None:
        saved = Path(config.checkpoint) / "config.yaml"
        if not saved.is_file() and not (Path(config.checkpoint) / "model_index.json").is_file():
            saved = resolve_checkpoint(Path(config.checkpoint))[0] / "config.yaml"
        base = load_config(TrainConfig, saved) if saved.is_file() else base
        return replace(base, **given)
    defaults = {name: getattr(base, name) for name in config.FROM_CHECKPOINT}
    return TrainConfig(**{**values, **defaults, **given})


def build_on_meta(
    config: CostConfig, train: TrainConfig
) -> tuple[MoHDiTTransformer2DModel, list[str]]:
    """Build the model on the meta device.

    Returns:
        The model, and a note for each assumption that was made.
    """
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        if not (path / "model_index.json").is_file():
            path = resolve_checkpoint(path)[1]
        arguments = MoHDiTTransformer2DModel.load_config(path / "transformer")
        with torch.device("meta"):
            return MoHDiTTransformer2DModel.from_config(arguments), []
    notes = []
    data, plan = train.data, train.model
    if config.preset is not None:
        plan = replace(plan, preset=config.preset, num_classes=plan.num_classes or IMAGENET_CLASSES)
        data = replace(data, image_size=256)
    if config.image_size is not None:
        data = replace(data, image_size=config.image_size)
    channels, factor = PUBLISHED_LATENTS
    if config.preset is None:
        autoencoder = data.autoencoder
        if autoencoder is None and data.latents is not None:
            autoencoder = open_latents(data.latents).index["autoencoder"]["name"]
        autoencoder = choose_autoencoder(autoencoder, data.source, "--data.autoencoder")
        if layout := latent_layout(autoencoder):
            channels, factor = layout
        else:
            notes.append(
                f"autoencoder {autoencoder} is not on this machine; assuming {channels} latent "
                f"channels and a downsampling factor of {factor}"
            )
    classes = plan.num_classes
    if classes is None and data.latents is not None:
        classes = len(open_latents(data.latents).class_names)
    elif classes is None and data.source == "digits":
        classes = DIGITS_CLASSES
    if classes is None:
        raise UserError(
            f"model.num_classes is not set; set it, because {data.source} is not opened to count "
            "its classes"
        )
    if data.image_size % factor:
        raise UserError(f"image_size is {data.image_size}; it must be a multiple of {factor}")
    size = data.image_size // factor
    train = replace(train, model=plan, data=data, init_from=None)
    objective = train.objective.build("cpu")
    with torch.device("meta"):
        return create_model(train, objective, (channels, size, size), classes), notes


def latent_layout(autoencoder: str) -> tuple[int, int] | None:
    """Return the latent channels and the downsampling factor of an autoencoder.

    Returns ``None`` if the configuration of the autoencoder is not on this machine.
    """
    if autoencoder == PIXELS:
        return 3, 1
    folder = EMBEDDED.get(autoencoder, Path(autoencoder))
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        if file.is_file():
            found = json.loads(file.read_text())
            return layout_of_config(found["_class_name"], found)[:2]
    return None


def parameters_by_part(model: MoHDiTTransformer2DModel) -> dict[str, int]:
    """Count the parameters of each part of the model, without empty parts."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(p for p, marks in PARTS.items() if any(mark in name for mark in marks))
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def format_cost(cost: dict[str, Any]) -> str:
    """Format the result of :func:`estimate_cost` as a table."""
    model, flops, memory = cost["model"], cost["flops_per_image"], cost["memory_per_gpu"]
    training = cost["training"]
    skipped = flops["saved_by_skipped_heads"]
    attention = flops["attention"]
    lines = [
        f"{model['layers']} layers of width {model['width']}, {model['tokens']} tokens; "
        f"{model['active_heads']} of {model['heads']} heads active, "
        f"{model['routed_layers']} layers with routed heads",
        "",
        *_section("parameters", cost["parameters"], lambda n: f"{n:,}"),
        "",
        *_section(
            "forward pass of one image, GFLOP (2 per multiply-add)",
            {k: v for k, v in flops.items() if k != "saved_by_skipped_heads"},
            lambda n: f"{n / 1e9:,.3f}",
        ),
        f"  skipped heads save {skipped / 1e9:,.3f}: {_percent(skipped, attention + skipped)} of "
        f"attention, {_percent(skipped, flops['total'] + skipped)} of all",
        "",
        *_section(
            f"memory per GPU at a micro-batch of {memory['batch']}, GiB",
            {k: v for k, v in memory.items() if k not in ("batch", "activations_per_image")},
            lambda n: f"{n / GIB:,.2f}",
        ),
        f"  each further image adds {memory['activations_per_image'] / 2**20:,.1f} MiB; kernel "
        "workspaces and allocator overhead are not included",
        "",
        f"training: {training['num_steps']:,} steps of {training['batch_size']:,} images, "
        f"precision {training['mixed_precision']}",
        f"  {training['flops']:.3g} FLOP; {training['images_per_second_per_gpu']:,.1f} images/s "
        f"per GPU at {training['mfu']:.0%} of {training['peak_flops'] / 1e12:,.1f} TFLOP/s "
        f"({training['gpu']})",
        f"  {_amount(training['gpu_hours'])} GPU-hours, {_duration(training)} on "
        f"{training['num_gpus']} GPU{'s' if training['num_gpus'] > 1 else ''}",
        *(f"note: {note}" for note in cost["notes"]),
    ]
    return "\n".join(lines)


def _section(title: str, rows: dict[str, Any], form: Any) -> list[str]:
    """Format a heading and one line per part, with its percentage of the total."""
    total = rows["total"]
    width = max(map(len, rows))
    cells = {name: form(value) for name, value in rows.items()}
    digits = max(map(len, cells.values()))
    return [f"{title}"] + [
        f"  {name:<{width}}  {cells[name]:>{digits}}"
        + ("" if name == "total" else f"  {_percent(rows[name], total):>6}")
        for name in rows
    ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _duration(training: dict[str, Any]) -> str:
    hours = training["gpu_hours"] / training["num_gpus"]
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{_amount(hours)} hours"


def _amount(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
