"""Which model is it: the configuration and the preset behind the shapes of a state dict."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..presets import PRESETS
from ..transformer import MoHDiTTransformer2DModel, per_layer
from .weights import LazyTensor, State

POSITIONS, LABEL_TABLE = "pos_embed", "y_embedder.embedding_table.weight"


def infer_config(state: State, overrides: dict[str, Any]) -> dict[str, Any]:
    """The configuration behind a state dict with published names.

    Heads are not in the shapes of a dense layer, nor active heads in those of a routed one: they
    are those of the preset with the same shapes, or ``overrides``.

    Raises:
        UserError: when no preset has these shapes; the nearest is named with what differs.
    """
    found = _sizes(state)
    shapes = _layer_shapes(state, found["depth"])
    given = {"num_heads", "num_shared_heads", "num_active_routed_heads"} & overrides.keys()
    if given:
        return {**found, **overrides}
    differences = {
        name: list(_differences(found, shapes, full_config(plan))) for name, plan in PRESETS.items()
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        few = differences[nearest][:3]
        more = len(differences[nearest]) - len(few)
        raise UserError(
            f"no preset has these weights; from the nearest, {nearest}, they differ in "
            f"{'; '.join(few)}{f' and {more} more' if more else ''}. If that is meant, give "
            "model.num_heads and, for MoH, model.num_shared_heads and "
            "model.num_active_routed_heads"
        )
    return {**found, **PRESETS[nearest], **overrides}


def preset_of(config: dict[str, Any]) -> str | None:
    """The preset with this architecture, whatever its latent size, channels and classes."""
    config = full_config(config)
    if config["mlp_ratio"] != 4 or config["timestep_freq_shift"] or _is_parameter_free(config):
        return None
    for name, plan in PRESETS.items():
        preset = full_config(plan)
        same = all(preset[key] == config[key] for key in ("depth", "hidden_size", "patch_size"))
        if same and head_plan(preset) == head_plan(config):
            return name
    return None


def describe(config: dict[str, Any]) -> str:
    """A model in words: its preset, or its sizes, then latents and classes."""
    config = full_config(config)
    moh = any(plan[1] is not None for plan in head_plan(config))
    name = preset_of(config) or (
        f"a {'MoH-' if moh else ''}DiT of no preset ({config['depth']} layers of width "
        f"{config['hidden_size']}, patch {config['patch_size']})"
    )
    if _is_parameter_free(config):
        name += " with the query-norm router"
    size, classes = config["sample_size"], config["num_classes"]
    return f"{name}, latents {config['in_channels']}×{size}×{size}, {classes} classes"


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with every argument of the model, defaults where it has none."""
    parameters = list(inspect.signature(MoHDiTTransformer2DModel.__init__).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    full = {**defaults, **{key: config[key] for key in defaults.keys() & config.keys()}}
    full["out_channels"] = full["out_channels"] or 2 * full["in_channels"]
    return full


def head_plan(config: dict[str, Any]) -> list[tuple[int, int | None, int, int]]:
    """Heads, shared heads, active routed heads and head width of every layer."""
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


def _sizes(state: State) -> dict[str, Any]:
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state[POSITIONS].shape[1]
        classes = state[LABEL_TABLE].shape[0] - 1
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        out = state["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"these are no weights of a (MoH-)DiT: missing {error.args[0]}") from None
    except (ValueError, IndexError):
        raise UserError("these are no weights of a (MoH-)DiT: x_embedder.proj is 4-D") from None
    layers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    return dict(
        sample_size=round(tokens**0.5) * patch,
        patch_size=patch,
        in_channels=channels,
        out_channels=out // patch**2,
        hidden_size=width,
        depth=max(layers) + 1,
        mlp_ratio=hidden / width,
        num_classes=classes,
    )


def _layer_shapes(state: State, depth: int) -> list[tuple[int, int | None, int]]:
    """Rows of the value projection, shared heads, routed heads of every layer."""
    layers = []
    for i in range(depth):
        names = [f"blocks.{i}.attn.{name}.weight" for name in ("qkv", "wg_1", "wg")]
        rows, shared, routed = (state[n].shape[0] if n in state else None for n in names)
        if shared is None and routed is not None:
            shared = 0
        layers.append(((rows or 0) // 3, shared, routed or 0))
    return layers


def _differences(
    found: dict[str, Any], shapes: list[tuple[int, int | None, int]], preset: dict[str, Any]
) -> Iterator[str]:
    """In words, how shapes differ from what a preset has."""
    for key in ("depth", "hidden_size", "patch_size"):
        if found[key] != preset[key]:
            yield f"{key} {found[key]} ({preset[key]} in the preset)"
    if found["mlp_ratio"] != 4:
        yield f"mlp_ratio {found['mlp_ratio']} (4 in the preset)"
    expected = [
        (heads * width, shared, 0 if shared is None else heads - shared)
        for heads, shared, _, width in head_plan(preset)
    ]
    for i, (mine, theirs) in enumerate(zip(shapes, expected, strict=False)):
        if mine != theirs:
            yield f"layer {i}: {_layer_words(*mine)} ({_layer_words(*theirs)} in the preset)"


def _layer_words(rows: int, shared: int | None, routed: int) -> str:
    router = "no router" if shared is None else f"{shared} shared and {routed} routed heads"
    return f"{router}, {rows} value rows"


def state_difference(
    model: MoHDiTTransformer2DModel, state: Mapping[str, Tensor | LazyTensor]
) -> str:
    """In words, how a state dict differs from what the model expects; empty when it does not."""
    expected = model.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    parts = [
        _some("missing", sorted(expected.keys() - state.keys())),
        _some("unexpected", sorted(state.keys() - expected.keys())),
        _some("shapes", shapes),
    ]
    return "; ".join(filter(None, parts))


def _some(what: str, items: list[str], limit: int = 4) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what}: {', '.join(items[:limit])}{more}"
