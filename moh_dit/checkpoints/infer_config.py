"""Which model is it: the configuration and the preset behind the shapes of a state dict."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..common.errors import UserError
from ..model.architecture import full_config, head_plan
from ..model.presets import PRESETS
from ..model.transformer import MoHDiTTransformer2DModel
from .weight_files import LazyTensor, State

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
