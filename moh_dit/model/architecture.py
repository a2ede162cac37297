"""Complete a model configuration, and name or describe its architecture."""

import inspect
from typing import Any

from .presets import PRESETS
from .transformer import MoHDiTTransformer2DModel, per_layer


def find_preset(config: dict[str, Any]) -> str | None:
    """Return the preset of this architecture, or ``None`` if there is no such preset.

    Latent size, latent channels and number of classes may differ from the preset's.
    """
    config = full_config(config)
    if config["mlp_ratio"] != 4 or config["timestep_freq_shift"] or _is_parameter_free(config):
        return None
    for name, plan in PRESETS.items():
        preset = full_config(plan)
        same = all(preset[key] == config[key] for key in ("depth", "hidden_size", "patch_size"))
        if same and head_plan(preset) == head_plan(config):
            return name
    return None


def describe_architecture(config: dict[str, Any]) -> str:
    """Describe a model in words: its preset, or else its sizes, then its latents and classes."""
    config = full_config(config)
    moh = any(plan[1] is not None for plan in head_plan(config))
    name = find_preset(config) or (
        f"a {'MoH-' if moh else ''}DiT of no preset ({config['depth']} layers of width "
        f"{config['hidden_size']}, patch {config['patch_size']})"
    )
    if _is_parameter_free(config):
        name += " with the query-norm router"
    size, classes = config["sample_size"], config["num_classes"]
    return f"{name}, latents {config['in_channels']}×{size}×{size}, {classes} classes"


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return every argument of the model: the given ones, and the defaults of all others."""
    parameters = list(inspect.signature(MoHDiTTransformer2DModel.__init__).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    full = {**defaults, **{key: config[key] for key in defaults.keys() & config.keys()}}
    full["out_channels"] = full["out_channels"] or 2 * full["in_channels"]
    return full


def head_plan(config: dict[str, Any]) -> list[tuple[int, int | None, int, int]]:
    """Return heads, shared heads, active routed heads and head width of every layer."""
    depth = config["depth"]
    heads = per_layer("num_heads", config["num_heads"], depth)
    shared = per_layer("num_shared_heads", config["num_shared_heads"], depth)
    active = per_layer("num_active_routed_heads", config["num_active_routed_heads"], depth)
    width = config["head_dim"]
    return [
        (h, s, 0 if s is None else k or 0, width or config["hidden_size"] // h)
        for h, s, k in zip(heads, shared, active, strict=True)
    ]


def _is_parameter_free(config: dict[str, Any]) -> bool:
    return config["router"] != "learned"
