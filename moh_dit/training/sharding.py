"""Tensors that FSDP2 spreads over processes: this process's part, and the whole.

On one process and under DDP every tensor is whole already, and nothing here does anything.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# Gathered at once: FSDP2 works in Python for every group, which a block is too short to hide.
BLOCKS_TOGETHER = 4


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, spread as ``like`` is; on the device of ``like``."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:  # AdamW's count of steps
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def joined_like(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what ``part`` is this process's part of, were it spread as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    joined = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole(joined)


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sums over the processes that hold different parts of ``like``."""
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(values, group=like.device_mesh.get_group(dimension))
    return values


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is spread over processes."""
    return isinstance(tensor, DTensor)


def shard(model: nn.Module, accelerator: Accelerator, gathered: torch.dtype | None) -> None:
    """Spread the weights of ``model`` over processes by FSDP2, to compute what DDP computes.

    Not by accelerate, which has one policy for a whole model and would cast inputs (the times of a
    flow among them) and sums of gradients to bf16: here autocast decides, as it does elsewhere, and
    what it rounds anyway is gathered rounded.

    Args:
        model: has its blocks in ``model.blocks``.
        accelerator: says over which processes, and whether blocks stay gathered from the forward to
            the backward pass.
        gathered: precision in which blocks are gathered (``None``: their own). The parts keep their
            own precision, and gradients are summed in float32.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    common: dict[str, Any] = dict(mesh=mesh, offload_policy=plugin.cpu_offload)
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    blocks = list(cast(nn.ModuleList, model.blocks))
    for first in range(0, len(blocks), BLOCKS_TOGETHER):
        fully_shard(
            blocks[first : first + BLOCKS_TOGETHER],
            mp_policy=policy,
            reshard_after_forward=plugin.reshard_after_forward,
            **common,
        )
    fully_shard(model, **common)


def release(module: nn.Module) -> None:
    """Let go of gathered weights that a forward pass has left for a backward pass.

    Without one they would outlive the next update of the parts.
    """
    for each in _spread(module):
        each.reshard()


def _spread(module: nn.Module) -> list[FSDPModule]:
    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def gather_state(
    named_parameters: list[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights by name, and the optimizer's state as ``"exp_avg.NAME"`` and so on.

    On the CPU where anything had to be gathered: the whole need not fit beside the shards.
    """
    weights, moments = {}, {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}.{name}"] = _gathered(value)
        weights[name] = _gathered(parameter.detach())
    return weights, moments


def _gathered(tensor: Tensor) -> Tensor:
    return whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor


def restore_state(
    named_parameters: list[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Put back what ``gather_state`` returned, however the tensors are spread now."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(".")
        states.setdefault(name, {})[kind] = value
    with torch.no_grad():
        for name, parameter in named_parameters:
            local(parameter).copy_(local(spread_like(weights[name], parameter)))
            if name in states:
                state = {k: spread_like(v, parameter) for k, v in states[name].items()}
                optimizer.state[parameter] = state
