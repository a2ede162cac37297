"""Convert state dicts and configurations between this project and diffusers.

This project uses the names of the published checkpoints, for dense DiT and MoH-DiT.
diffusers' ``DiTTransformer2DModel`` differs in more than names: it splits queries, keys and values,
stores the timestep and label embedders once per block, and computes the position table.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from ..common.errors import UserError
from ..model.architecture import full_config, head_plan
from .infer_config import IMAGENET_CLASSES, LABEL_TABLE, POSITIONS
from .weight_files import State

DIFFUSERS_POSITIONS = "pos_embed.pos_embed"
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older folders

# Names of this project → names of diffusers. diffusers stores REPEATED modules in every block.
LABELS = "y_embedder.embedding_table"
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
REPEATED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    LABELS: "norm1.emb.class_embedder.embedding_table",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# Arguments of this model → names and defaults of diffusers' class.
ARGUMENTS: dict[str, tuple[str, Any]] = {
    "sample_size": ("sample_size", 32),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "out_channels": ("out_channels", None),
    "num_heads": ("num_attention_heads", 16),
    "head_dim": ("attention_head_dim", 72),
    "depth": ("num_layers", 28),
    "num_classes": ("num_embeds_ada_norm", 1000),
}
# Settings of diffusers' class for which this model supports one value only.
DIFFUSERS_FIXED = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
)


def is_diffusers(state: State) -> bool:
    """Return whether a state dict has the names of diffusers' ``DiTTransformer2DModel``."""
    return any(key.startswith("transformer_blocks.") for key in state)


def from_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the configuration of a ``DiTTransformer2DModel`` to arguments of this model.

    Raises:
        UserError: a setting has a value that this model does not support.
    """
    for key, expected in DIFFUSERS_FIXED.items():
        if (found := config.get(key, expected)) != expected:
            raise UserError(f"{key} is {found!r}, but a DiT requires {expected!r}")
    own = {name: config.get(theirs, default) for name, (theirs, default) in ARGUMENTS.items()}
    own["out_channels"] = own["out_channels"] or own["in_channels"]
    own["hidden_size"] = own["num_heads"] * own.pop("head_dim")
    return {**own, "timestep_freq_shift": config.get("timestep_freq_shift", 0)}


def to_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert arguments of this model to the configuration of a ``DiTTransformer2DModel``.

    Raises:
        UserError: diffusers' class cannot represent the model.
    """
    config = full_config(config)
    heads = config["num_heads"]
    if any(plan[1] is not None for plan in head_plan(config)):
        raise UserError(
            "diffusers' DiTTransformer2DModel has no mixture-of-head layers; convert a MoH model "
            "to moh-dit, pipeline or published instead"
        )
    if not isinstance(heads, int) and len(set(heads)) == 1:
        heads = heads[0]
    if not isinstance(heads, int):
        raise UserError(
            f"diffusers' DiTTransformer2DModel needs the same num_heads in every layer, got {heads}"
        )
    width = config["head_dim"] or config["hidden_size"] // heads
    if heads * width != config["hidden_size"] or config["mlp_ratio"] != 4:
        raise UserError(
            "diffusers' DiTTransformer2DModel needs num_heads · head_dim = hidden_size and an "
            f"mlp_ratio of 4; this model has {heads} · {width}, {config['hidden_size']} and "
            f"{config['mlp_ratio']}"
        )
    own = {**config, "num_heads": heads, "head_dim": width}
    converted = {
        "_class_name": "DiTTransformer2DModel",
        **{theirs: own[name] for name, (theirs, _) in ARGUMENTS.items()},
        "norm_eps": 1e-6,
        **DIFFUSERS_FIXED,
    }
    if config["timestep_freq_shift"]:  # ignored by diffusers; needed to convert back
        converted["timestep_freq_shift"] = config["timestep_freq_shift"]
    return converted


def _matching_names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each name of this project with its names in diffusers: equal copies, or q, k and v."""
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    for kind in ("weight", "bias"):
        for own, theirs in OUTSIDE.items():
            yield f"{own}.{kind}", [f"{theirs}.{kind}"]
        for own, theirs in REPEATED.items():
            if (own, kind) != (LABELS, "bias"):  # an embedding has no bias
                yield f"{own}.{kind}", [f"{block}.{theirs}.{kind}" for block in blocks]
        for i, block in enumerate(blocks):
            for own, theirs in BLOCK.items():
                yield f"blocks.{i}.{own}.{kind}", [f"{block}.{theirs}.{kind}"]
            yield f"blocks.{i}.attn.qkv.{kind}", [f"{block}.{part}.{kind}" for part in QKV]


def from_diffusers(state: State, config: dict[str, Any]) -> State:
    """Convert the state dict of a ``DiTTransformer2DModel`` to this project's names.

    Tensors are removed from ``state`` as they are converted, which releases their memory.

    Raises:
        UserError: a name is missing or unknown, or the embedders differ between blocks.
    """
    converted: State = {}
    for own, names in _matching_names(config["depth"]):
        if missing := [name for name in names if name not in state]:
            raise UserError(f"missing: {missing[0]}")
        tensors = [state.pop(name) for name in names]
        if ".qkv." in own:
            converted[own] = torch.cat(tensors)
        else:
            converted[own] = _require_equal(tensors, names[0].partition(".0.")[2])
    dtype = converted["x_embedder.proj.weight"].dtype
    stored = state.pop(DIFFUSERS_POSITIONS, None)
    converted[POSITIONS] = position_table(config).to(dtype) if stored is None else stored
    if state:
        raise UserError(f"unexpected: {', '.join(sorted(state)[:4])}")
    return converted


def to_diffusers(state: State, config: dict[str, Any]) -> State:
    """Convert the state dict of a dense model to the names of a ``DiTTransformer2DModel``.

    diffusers computes the position table. The table is stored only if it differs from the computed
    one in the last digits, so that converting back restores it; diffusers ignores it.

    Raises:
        UserError: the positions are not the sin-cos table.
    """
    converted: State = {}
    for own, names in _matching_names(config["depth"]):
        if ".qkv." in own:
            converted |= zip(names, state[own].chunk(3), strict=True)
        else:
            # Further copies, because safetensors does not write one tensor under several names.
            copies = [state[own], *(state[own].clone() for _ in names[1:])]
            converted |= zip(names, copies, strict=True)
    positions, computed = state[POSITIONS], position_table(config)
    if not torch.allclose(positions.float(), computed.to(positions.dtype).float(), atol=1e-5):
        raise UserError(
            f"{POSITIONS} is not the 2-D sin-cos table; diffusers' DiTTransformer2DModel computes "
            "that table and cannot store another"
        )
    rebuilt = computed.to(state["x_embedder.proj.weight"].dtype)
    if rebuilt.dtype != positions.dtype or not torch.equal(rebuilt, positions):
        converted[DIFFUSERS_POSITIONS] = positions
    return converted


def position_table(config: dict[str, Any]) -> Tensor:
    """Return the 2-D sin-cos positions of a model, float32 (1, N, C)."""
    grid = config["sample_size"] // config["patch_size"]
    table = get_2d_sincos_pos_embed(config["hidden_size"], grid, base_size=grid)
    return table.float().unsqueeze(0)


def fit_positions(state: State, config: dict[str, Any]) -> None:
    """Replace the position table of a state dict if it is the sin-cos table of another size.

    The table is fixed, so a model for latents of one size can start one for another size.

    Args:
        state: a state dict under this project's names; changed in place.
        config: arguments of the model that the state is loaded into.
    """
    table = state.get(POSITIONS)
    tokens, width = (config["sample_size"] // config["patch_size"]) ** 2, config["hidden_size"]
    if table is None or table.ndim != 3 or table.shape[2] != width or table.shape[1] == tokens:
        return
    stored = {**config, "sample_size": round(table.shape[1] ** 0.5), "patch_size": 1}
    expected = position_table(stored)
    if expected.shape == table.shape and torch.allclose(table.float(), expected, atol=1e-2):
        state[POSITIONS] = position_table(config).to(table.dtype)


def fit_null_class(state: State, config: dict[str, Any], *, is_given: bool) -> None:
    """Add a row for the null class to a label table that has none: the mean of all classes.

    Models that were trained without label dropout may lack this row. Guidance by it is meaningless,
    which a printed line says. Another line says that the last row is only assumed to be this row.

    Args:
        state: a state dict under this project's names; changed in place.
        config: arguments of the model that the state is loaded into.
        is_given: whether the number of classes was given, not inferred from the table.
    """
    table, classes = state.get(LABEL_TABLE), config["num_classes"]
    if table is None or table.ndim != 2:
        return
    if table.shape[0] != classes:
        if not is_given and classes != IMAGENET_CLASSES:
            print(
                "note: the last row of the label table is taken for the null class; if it is a "
                f"class, give model.num_classes {classes + 1}"
            )
        return
    state[LABEL_TABLE] = torch.cat([table, table.mean(0, keepdim=True)])
    print(
        f"note: the label table has {table.shape[0]} rows for as many classes and none for the "
        "null class; sample with guidance_scale 1, or with a guidance_checkpoint"
    )


def _require_equal(copies: list[Tensor], name: str) -> Tensor:
    """Return the first of several tensors, or raise ``UserError`` if another one differs."""
    for i, copy in enumerate(copies[1:], start=1):
        if not torch.equal(copies[0], copy):
            raise UserError(
                f"{name} differs between block 0 and block {i}: a DiT has one timestep and one "
                "label embedder for all blocks"
            )
    return copies[0]
