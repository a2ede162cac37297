"""Infer the configuration of a model from the names and shapes of its weights."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..common.errors import UserError
from ..model.architecture import full_config, head_plan
from ..model.presets import PRESETS
from ..model.transformer import MoHDiTTransformer2DModel
from .weight_files import State

POSITIONS, LABEL_TABLE = "pos_embed", "y_embedder.embedding_table.weight"

IMAGENET_CLASSES = 1000  # a table of as many rows has no null class

Shapes = Mapping[str, tuple[int, ...]]


def infer_config(state: State, overrides: dict[str, Any]) -> dict[str, Any]:
    """Infer the configuration of a model from its state dict.

    Shapes do not tell the number of heads of a dense layer, nor the number of active heads of a
    routed one. These numbers are taken from ``overrides`` or from the preset with the same shapes.

    Args:
        state: a state dict with the names of published checkpoints.
        overrides: arguments of the model that replace inferred ones.

    Raises:
        UserError: no preset has these shapes. The message names the most similar preset and the
            differences.
    """
    found = _read_sizes(state)
    if found["num_classes"] == 0 and "num_classes" not in overrides:
        raise UserError(
            "the label table has one row, which is taken for the null class; if it is a class, "
            "give model.num_classes 1"
        )
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
            f"no preset has the shapes of these weights; the most similar preset, {nearest}, "
            f"differs in {'; '.join(few)}{f' and {more} more' if more else ''}. If these weights "
            "are right, give model.num_heads and, for MoH, model.num_shared_heads and "
            "model.num_active_routed_heads"
        )
    return {**found, **PRESETS[nearest], **overrides}


def _read_sizes(state: State) -> dict[str, Any]:
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state[POSITIONS].shape[1]
        rows = state[LABEL_TABLE].shape[0]
        classes = rows if rows == IMAGENET_CLASSES else rows - 1  # the last row is the null class
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        out = state["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"not a DiT or MoH-DiT checkpoint: {error.args[0]} is missing") from None
    except (ValueError, IndexError):
        patches = len(state["x_embedder.proj.weight"].shape)
        raise UserError(
            f"not a DiT or MoH-DiT checkpoint: x_embedder.proj.weight must be 4-D, got {patches}-D"
        ) from None
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
    """Return (rows of the value projection, shared heads, routed heads) of every layer."""
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
    """Describe the differences between the shapes of a model and those of a preset."""
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
            yield f"layer {i}: {_describe_layer(*mine)} ({_describe_layer(*theirs)} in the preset)"


def _describe_layer(rows: int, shared: int | None, routed: int) -> str:
    router = "no router" if shared is None else f"{shared} shared and {routed} routed heads"
    return f"{router}, {rows} value rows"


def check_sizes(state: State, config: dict[str, Any]) -> None:
    """Refuse a configuration before anything of an absurd size is created.

    Args:
        state: the weights.
        config: all arguments of the model.

    Raises:
        UserError: a size is not a positive number, or larger than any model of these weights.
    """
    for name in ("sample_size", "patch_size", "in_channels", "hidden_size", "depth", "num_classes"):
        if not (isinstance(config[name], int) and config[name] > 0):
            raise UserError(f"{name} is {config[name]!r}; it must be a positive whole number")
    if config["depth"] > len(state):
        raise UserError(
            f"depth is {config['depth']}, but there are only {len(state)} weights; the "
            "configuration belongs to another model, or is damaged"
        )
    positions = (config["sample_size"] // config["patch_size"]) ** 2 * config["hidden_size"]
    if positions > 10**7 + 16 * sum(tensor.numel() for tensor in state.values()):
        raise UserError(
            f"sample_size {config['sample_size']} and hidden_size {config['hidden_size']} are far "
            "too large for these weights; the configuration belongs to another model, or is damaged"
        )


def state_difference(model: MoHDiTTransformer2DModel, state: State) -> str:
    """Describe how a state dict differs from the model's; return an empty text if it fits."""
    return shape_difference(shapes_of(model.state_dict()), shapes_of(state))


def shapes_of(state: State) -> Shapes:
    """Return the shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def shape_difference(expected: Shapes, found: Shapes) -> str:
    """Describe how names and shapes of tensors differ; return an empty text if they are equal."""
    shapes = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    parts = [
        _first_items("missing", sorted(expected.keys() - found.keys())),
        _first_items("unexpected", sorted(found.keys() - expected.keys())),
        _first_items("shapes", shapes),
    ]
    return "; ".join(filter(None, parts))


def _first_items(title: str, items: list[str], limit: int = 4) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{title}: {', '.join(items[:limit])}{more}"
