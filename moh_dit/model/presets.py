"""List the published models, one line each (MoH §4.2 and appendix; DiT table 1), and build them."""

import difflib
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError

if TYPE_CHECKING:
    from .transformer import MoHDiTTransformer2DModel

SIZES: dict[str, dict[str, Any]] = {
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}


def _moh(heads: Any, shared: list[int], routed: list[int], head_dim: int) -> dict[str, Any]:
    plan = dict(num_heads=heads, num_shared_heads=shared, num_active_routed_heads=routed)
    return {**plan, "head_dim": head_dim}


# Heads, shared heads and active routed heads of every layer, then the head width. The number in
# the name is the percentage of active heads over the whole model.
_L_HEADS = [8] * 8 + [16] * 8 + [24] * 8
_XL_HEADS = [8] * 9 + [16] * 10 + [24] * 9
# fmt: off
MOH_PLANS = {
    "S/2-90": _moh(6, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4, 64),
    "S/2-75": _moh(6, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2, 64),
    "B/2-90": _moh(12, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2, 64),
    "B/2-75": _moh(12, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2, 64),
    "L/2-90": _moh(_L_HEADS, [8] * 8 + [16] * 8 + [16] * 8, [0] * 8 + [0] * 8 + [3] * 8, 64),
    "L/2-75": _moh(_L_HEADS, [8] * 8 + [8] * 8 + [12] * 8, [0] * 8 + [4] * 8 + [4] * 8, 64),
    "XL/2-90": _moh(_XL_HEADS, [8] * 9 + [16] * 10 + [16] * 9, [0] * 9 + [0] * 10 + [3] * 9, 72),
    "XL/2-75": _moh(_XL_HEADS, [8] * 9 + [10] * 10 + [14] * 9, [0] * 9 + [2] * 10 + [2] * 9, 72),
}
# fmt: on

PRESETS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {**shape, "patch_size": patch}
    for size, shape in SIZES.items()
    for patch in (2, 4, 8)
} | {
    f"MoH-DiT-{name}": {**SIZES[name.split("/")[0]], "patch_size": 2, **plan}
    for name, plan in MOH_PLANS.items()
}


def build_model(preset: str, **overrides: Any) -> "MoHDiTTransformer2DModel":
    """Build a published model with random weights.

        model = build_model("MoH-DiT-XL/2-75", sample_size=64, num_classes=10)

    Args:
        preset: name of the model, a key of ``PRESETS``: DiT-S/2 … DiT-XL/8 (dense) or
            MoH-DiT-S/2-75 … MoH-DiT-XL/2-90.
        overrides: arguments of :class:`MoHDiTTransformer2DModel` to change. By default,
            ``sample_size`` is 32 (256 px images through a factor-8 autoencoder), ``in_channels`` 4
            and ``num_classes`` 1000.

    Returns:
        The model in training mode, float32, on the current default device.

    Raises:
        UserError: if there is no preset of this name. The message lists similar names.
    """
    from .transformer import MoHDiTTransformer2DModel  # imports torch, which preset names do not

    return MoHDiTTransformer2DModel(**{**preset_config(preset), **overrides})


def preset_config(preset: str) -> dict[str, Any]:
    """Return the model arguments that a preset sets.

    Raises:
        UserError: if there is no preset of this name. The message lists similar names.
    """
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=3, cutoff=0.3) or list(PRESETS)
        raise UserError(f"no preset is named {preset!r}; the nearest are {', '.join(nearest)}")
    return PRESETS[preset]
