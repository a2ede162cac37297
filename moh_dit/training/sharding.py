"""Shard weights over processes with FSDP2, and convert between full tensors and shards.

On one process and under DDP every tensor is a full tensor, and these functions return it unchanged.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

CopyTensor: TypeAlias = Callable[[str, Tensor], Tensor]  # takes a name and a tensor

# One block is too short to hide FSDP2's per-group Python overhead.
BLOCKS_PER_GROUP = 4


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is sharded over processes."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares memory with ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor that every rank holds, with the sharding and device of ``like``."""
    value = value.to(like.device)
    # AdamW's step count has another shape and is not sharded.
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gather_like(shard: Tensor, like: Tensor) -> Tensor:
    """Gather the full tensor from this rank's shard, using the sharding of ``like``."""
    if not isinstance(like, DTensor):
        return shard
    sharded = DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return full_tensor(sharded)


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sum ``values`` in place over the ranks that hold different shards of ``like``."""
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(values, group=like.device_mesh.get_group(dimension))
    return values


def shard_model(
    model: nn.Module, accelerator: Accelerator, gather_dtype: torch.dtype | None
) -> None:
    """Shard the weights of ``model`` over processes with FSDP2; it computes the same as DDP.

    accelerate has one precision policy for a whole model. It would cast inputs (for example the
    times of a flow) and gradient sums to bf16. Here autocast decides about precision, as without
    FSDP2. Only weights that autocast rounds anyway are gathered in bf16.

    Args:
        model: a model with its blocks in ``model.blocks``.
        accelerator: defines the processes, and whether blocks stay gathered between the forward and
            the backward pass.
        gather_dtype: precision in which the blocks are gathered; ``None`` for their own. The shards
            keep their own precision, and gradients are summed in float32.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    common: dict[str, Any] = dict(mesh=mesh, offload_policy=plugin.cpu_offload)
    policy = MixedPrecisionPolicy(gather_dtype, torch.float32, cast_forward_inputs=False)
    blocks = list(cast(nn.ModuleList, model.blocks))
    for first in range(0, len(blocks), BLOCKS_PER_GROUP):
        fully_shard(
            blocks[first : first + BLOCKS_PER_GROUP],
            mp_policy=policy,
            reshard_after_forward=plugin.reshard_after_forward,
            **common,
        )
    fully_shard(model, **common)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass keeps for its backward pass.

    Call this after a forward pass without a backward pass. Otherwise the next forward pass uses
    these weights instead of the updated shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_state(
    named_parameters: list[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    copy: CopyTensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gather all weights by name, and the optimizer state by ``"exp_avg.NAME"`` and so on.

    Args:
        named_parameters: the parameters by name.
        optimizer: the optimizer with their state.
        copy: called with the name of each full tensor and the tensor; returns what to keep of it.
            One tensor after another is gathered, because the GPU may lack memory for full tensors
            and shards together. ``None`` on ranks that keep nothing; they still take part.

    Returns:
        Two dictionaries of the kept tensors; empty if ``copy`` is ``None``.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}

    def gather(kept: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        full = full_tensor(tensor)
        if copy is not None:
            kept[name] = copy(name, full)

    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            gather(moments, f"{key}.{name}", value)
        gather(weights, name, parameter.detach())
    return weights, moments


def restore_state(
    named_parameters: list[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Load the full tensors that ``gather_state`` returned, with the present sharding."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(".")
        states.setdefault(name, {})[kind] = value
    with torch.no_grad():
        for name, parameter in named_parameters:
            local_shard(parameter).copy_(local_shard(shard_like(weights[name], parameter)))
            if name in states:
                state = {k: shard_like(v, parameter) for k, v in states[name].items()}
                optimizer.state[parameter] = state
