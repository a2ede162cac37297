"""What a configuration costs: parameters, arithmetic, memory and GPU-hours, before it is run."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..autoencoder import EMBEDDED
from ..checkpoints.opening import resolve_checkpoint
from ..common.cli import load_config
from ..common.errors import UserError
from ..common.version import __version__
from ..model.flops import PEAKS, count_flops, peak_of, skipped_flops, skipped_heads
from ..model.transformer import DiTBlock, MoHDiTTransformer2DModel
from ..training.config import TrainConfig
from ..training.setup import build_model
from .config import CostConfig
from .memory_estimate import activation_bytes, state_bytes

GIB = 2**30
DIGITS_CLASSES, IMAGENET_CLASSES = 10, 1000
PUBLISHED_LATENTS = (4, 8)  # channels, and image pixels per latent position along a side
# Parts of the parameters, by what a name contains; the first that fits counts.
PARTS = {
    "routers": (".wg",),
    "attention": (".attn.",),
    "MLP": (".mlp.fc",),
    "adaLN": ("adaLN_modulation",),
    "labels": ("y_embedder",),
    "patches, timestep, positions": ("x_embedder", "t_embedder", "pos_embed"),
    "output": ("final_layer.linear",),
}


def account(config: CostConfig) -> dict[str, Any]:
    """Everything there is to say about ``config``; FLOPs, bytes and hours as plain numbers.

    Raises:
        UserError: settings that contradict each other or leave the model open.
    """
    config.check_choice()
    train = training_settings(config)
    model, notes = build_on_meta(config, train)
    share = config.num_gpus * train.gradient_accumulation_steps
    train.check(config.num_gpus)
    if not 0 < config.mfu <= 1:
        raise UserError(f"mfu is {config.mfu}; give a share of the peak, in (0, 1]")
    at_once = train.batch_size // share
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
            fused_gates=True,  # as the kernels on a GPU do
            checkpointing=train.gradient_checkpointing,
        )
        for images in (at_once, at_once + 1)
    )
    peak = train.peak_tflops and train.peak_tflops * 1e12
    peak = peak or peak_of(config.gpu, train.mixed_precision, train.allow_tf32)
    if peak is None:
        raise UserError(
            f"gpu {config.gpu!r}: no peak is known; give one of {', '.join(PEAKS)}, or peak_tflops"
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
        "parameters": {"total": sum(p.numel() for p in model.parameters()), **by_part(model)},
        "flops_per_image": {
            "total": per_image,
            **flops,
            "saved_by_skipped_heads": skipped,
        },
        "memory_per_gpu": {
            "batch": at_once,
            "total": sum(state.values()) + activations,
            "activations": activations,
            "activations_per_image": one_more - activations,
            **state,
        },
        "training": {
            "batch_size": train.batch_size,
            "num_steps": train.num_steps,
            "mixed_precision": train.mixed_precision,
            "compile": train.compile,
            "gradient_checkpointing": train.gradient_checkpointing,
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
    """Print the cost of a configuration as a table, or as JSON."""
    found = account(config)
    print(json.dumps(found, indent=1) if config.json else table(found))


def training_settings(config: CostConfig) -> TrainConfig:
    """The run that is asked about: what is given, else what the run folder says, else defaults."""
    names = [field.name for field in fields(TrainConfig)]
    values = {name: getattr(config, name) for name in names}
    if config.checkpoint is not None:
        saved = Path(config.checkpoint) / "config.yaml"
        if not saved.is_file() and not (Path(config.checkpoint) / "model_index.json").is_file():
            saved = resolve_checkpoint(Path(config.checkpoint))[0] / "config.yaml"
        base = load_config(TrainConfig, saved) if saved.is_file() else TrainConfig()
        asked = {name: getattr(config, name) for name in config.OPEN}
        return replace(base, **{name: v for name, v in asked.items() if v is not None})
    defaults = TrainConfig()
    for name in config.OPEN:
        if values[name] is None:
            values[name] = getattr(defaults, name)
    return TrainConfig(**values)


def build_on_meta(
    config: CostConfig, train: TrainConfig
) -> tuple[MoHDiTTransformer2DModel, list[str]]:
    """The model without its weights, and what had to be assumed for it."""
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
    channels, factor, known = (
        (*PUBLISHED_LATENTS, True) if config.preset else latent_layout(data.autoencoder)
    )
    if not known:
        notes.append(f"autoencoder {data.autoencoder}: taken for 4 channels at 1/8 of the side")
    classes = plan.num_classes or (DIGITS_CLASSES if data.source == "digits" else None)
    if classes is None:
        raise UserError(
            f"model.num_classes is not set, and {data.source} is not opened to count them; give it"
        )
    if data.image_size % factor:
        raise UserError(f"image_size {data.image_size} is no multiple of {factor}")
    size = data.image_size // factor
    train = replace(train, model=plan, data=data, init_from=None)
    objective = train.objective.build("cpu")
    with torch.device("meta"):
        return build_model(train, objective, (channels, size, size), classes), notes


def latent_layout(autoencoder: str) -> tuple[int, int, bool]:
    """``(channels, factor, known)`` of an autoencoder, from its configuration where it is here."""
    folder = EMBEDDED.get(autoencoder, Path(autoencoder))
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        if file.is_file():
            found = json.loads(file.read_text())
            return found["latent_channels"], 2 ** (len(found["block_out_channels"]) - 1), True
    return *PUBLISHED_LATENTS, False


def by_part(model: MoHDiTTransformer2DModel) -> dict[str, int]:
    """Parameters of each of ``PARTS`` that there are."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(p for p, marks in PARTS.items() if any(mark in name for mark in marks))
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def table(found: dict[str, Any]) -> str:
    """What :func:`account` found, for people."""
    model, flops, memory = found["model"], found["flops_per_image"], found["memory_per_gpu"]
    training = found["training"]
    skipped = flops["saved_by_skipped_heads"]
    attention = flops["attention"]
    lines = [
        f"{model['layers']} layers of width {model['width']}, {model['tokens']} tokens; "
        f"{model['active_heads']} of {model['heads']} heads active, "
        f"{model['routed_layers']} layers route",
        "",
        *_section("parameters", found["parameters"], lambda n: f"{n:,}"),
        "",
        *_section(
            "forward pass of one image, GFLOP (2 × multiply-adds)",
            {k: v for k, v in flops.items() if k != "saved_by_skipped_heads"},
            lambda n: f"{n / 1e9:,.3f}",
        ),
        f"  skipped heads save {skipped / 1e9:,.3f}: {_percent(skipped, attention + skipped)} of "
        f"attention, {_percent(skipped, flops['total'] + skipped)} of all",
        "",
        *_section(
            f"memory of a GPU that trains {memory['batch']} images at once, GiB",
            {k: v for k, v in memory.items() if k not in ("batch", "activations_per_image")},
            lambda n: f"{n / GIB:,.2f}",
        ),
        f"  each further image takes {memory['activations_per_image'] / 2**20:,.1f} MiB; "
        "kernels' buffers and the allocator's slack come on top",
        "",
        f"training: {training['num_steps']:,} steps of {training['batch_size']:,} images, "
        f"precision {training['mixed_precision']}",
        f"  {training['flops']:.3g} FLOP; at {training['mfu']:.0%} of "
        f"{training['peak_flops'] / 1e12:,.1f} TFLOP/s ({training['gpu']}) "
        f"{training['images_per_second_per_gpu']:,.1f} images/s a GPU",
        f"  {_amount(training['gpu_hours'])} GPU-hours, {_duration(training)} on "
        f"{training['num_gpus']} GPU{'s' if training['num_gpus'] > 1 else ''}",
        *(f"note: {note}" for note in found["notes"]),
    ]
    return "\n".join(lines)


def _section(title: str, rows: dict[str, Any], form: Any) -> list[str]:
    """A heading with the total, and a line for every part with its share of it."""
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
