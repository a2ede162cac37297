"""The same model under other names: this project's state dicts and diffusers', either way.

Published names are this project's own (see ``transformer``), for dense DiT as for MoH-DiT. In
diffusers' ``DiTTransformer2DModel`` the same weights have other names: queries, keys and values are
apart, the timestep and label embedders stored once per block, the position table computed.
"""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from ..common.errors import UserError
from ..model.architecture import full_config, head_plan
from .infer_config import POSITIONS
from .weight_files import LazyTensor, State, lazy

DIFFUSERS_POSITIONS = "pos_embed.pos_embed"
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders

# Module names, ours to diffusers': outside the blocks, in a block, in a block but outside ours.
LABELS = "y_embedder.embedding_table"  # has no bias
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
# What diffusers' class can be configured to, and this model cannot.
DIFFUSERS_FIXED = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
)


def is_diffusers(state: State) -> bool:
    """Whether a state dict has the names of diffusers' ``DiTTransformer2DModel``."""
    return any(key.startswith("transformer_blocks.") for key in state)


def from_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`MoHDiTTransformer2DModel` from a ``DiTTransformer2DModel``'s.

    Raises:
        UserError: for a setting that this model does not have.
    """
    for key, expected in DIFFUSERS_FIXED.items():
        if (found := config.get(key, expected)) != expected:
            raise UserError(f"{key} is {found!r}; a DiT has {expected!r}")
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    in_channels = config.get("in_channels", 4)
    return dict(
        sample_size=config.get("sample_size", 32),
        patch_size=config.get("patch_size", 2),
        in_channels=in_channels,
        out_channels=config.get("out_channels") or in_channels,
        hidden_size=heads * head_dim,
        depth=config.get("num_layers", 28),
        num_heads=heads,
        num_classes=config.get("num_embeds_ada_norm", 1000),
        timestep_freq_shift=config.get("timestep_freq_shift", 0),
    )


def to_diffusers_config(config: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`from_diffusers_config`.

    Raises:
        UserError: when diffusers' class cannot express the model.
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
        raise UserError("diffusers' DiTTransformer2DModel has the same num_heads in every layer")
    width = config["head_dim"] or config["hidden_size"] // heads
    if heads * width != config["hidden_size"] or config["mlp_ratio"] != 4:
        raise UserError(
            "diffusers' DiTTransformer2DModel has num_heads · head_dim = hidden_size and an "
            f"mlp_ratio of 4; this model has {heads} · {width}, {config['hidden_size']} and "
            f"{config['mlp_ratio']}"
        )
    converted = dict(
        _class_name="DiTTransformer2DModel",
        sample_size=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=config["depth"],
        num_embeds_ada_norm=config["num_classes"],
        norm_eps=1e-6,
        **DIFFUSERS_FIXED,
    )
    if config["timestep_freq_shift"]:  # not diffusers', which ignores it; for the way back
        converted["timestep_freq_shift"] = config["timestep_freq_shift"]
    return converted


def from_diffusers(state: State, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """A ``DiTTransformer2DModel``'s state dict under this project's names.

    That the embedders are equal in all blocks is checked when they are read.

    Raises:
        UserError: for names that are missing or unknown.
    """
    names, converted = dict(state), {}
    depth = config["depth"]

    def take(key: str) -> LazyTensor:
        if key not in names:
            raise UserError(f"missing: {key}")
        return names.pop(key)

    for kind in ("weight", "bias"):
        for own, theirs in OUTSIDE.items():
            converted[f"{own}.{kind}"] = take(f"{theirs}.{kind}")
        for own, theirs in REPEATED.items():
            if (own, kind) == (LABELS, "bias"):
                continue
            each = [take(f"transformer_blocks.{i}.{theirs}.{kind}") for i in range(depth)]
            converted[f"{own}.{kind}"] = _the_same(each, f"{theirs}.{kind}")
        for i in range(depth):
            for own, theirs in BLOCK.items():
                key = f"blocks.{i}.{own}.{kind}"
                converted[key] = take(f"transformer_blocks.{i}.{theirs}.{kind}")
            parts = [take(f"transformer_blocks.{i}.{part}.{kind}") for part in QKV]
            converted[f"blocks.{i}.attn.qkv.{kind}"] = _stacked(parts)
    dtype = converted["x_embedder.proj.weight"].dtype
    stored = names.pop(DIFFUSERS_POSITIONS, None)
    converted[POSITIONS] = stored or lazy(position_table(config).to(dtype))
    if names:
        raise UserError(f"unexpected: {', '.join(sorted(names)[:4])}")
    return converted


def to_diffusers(state: State, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """This project's state dict of a dense model under diffusers' names.

    The position table, which diffusers computes, is left out, unless that would lose anything of
    it; diffusers ignores it then.

    Raises:
        UserError: for positions other than the sin-cos table.
    """
    depth, converted = config["depth"], {}
    for kind in ("weight", "bias"):
        for own, theirs in OUTSIDE.items():
            converted[f"{theirs}.{kind}"] = state[f"{own}.{kind}"]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for own, theirs in REPEATED.items():
                if (key := f"{own}.{kind}") in state:
                    converted[f"{block}.{theirs}.{kind}"] = state[key]
            for own, theirs in BLOCK.items():
                converted[f"{block}.{theirs}.{kind}"] = state[f"blocks.{i}.{own}.{kind}"]
            qkv = state[f"blocks.{i}.attn.qkv.{kind}"]
            for part, name in enumerate(QKV):
                converted[f"{block}.{name}.{kind}"] = _third(qkv, part)
    positions, computed = state[POSITIONS].read(), position_table(config)
    if not torch.allclose(positions.float(), computed.to(positions.dtype).float(), atol=1e-5):
        raise UserError(
            f"{POSITIONS} is not the 2-D sin-cos table, which diffusers' DiTTransformer2DModel "
            "computes and does not store"
        )
    rebuilt = computed.to(state["x_embedder.proj.weight"].dtype)
    if rebuilt.dtype != positions.dtype or not torch.equal(rebuilt, positions):
        converted[DIFFUSERS_POSITIONS] = state[POSITIONS]
    return converted


def position_table(config: dict[str, Any]) -> Tensor:
    """The fixed 2-D sin-cos positions (1, N, C) of a configuration, float32."""
    grid = config["sample_size"] // config["patch_size"]
    table = get_2d_sincos_pos_embed(config["hidden_size"], grid, base_size=grid)
    return table.float().unsqueeze(0)


def _the_same(copies: list[LazyTensor], name: str) -> LazyTensor:
    def read() -> Tensor:
        first = copies[0].read()
        for i, copy in enumerate(copies):
            if i and not torch.equal(first, copy.read()):
                raise UserError(
                    f"{name} differs between block 0 and block {i}: a DiT has one timestep and "
                    "one label embedder for all blocks"
                )
        return first

    return LazyTensor(copies[0].shape, copies[0].dtype, read)


def _stacked(parts: list[LazyTensor]) -> LazyTensor:
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def _third(qkv: LazyTensor, part: int) -> LazyTensor:
    rows = qkv.shape[0] // 3
    shape = (rows, *qkv.shape[1:])
    return LazyTensor(shape, qkv.dtype, lambda: qkv.read()[part * rows : (part + 1) * rows])
