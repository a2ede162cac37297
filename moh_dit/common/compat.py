"""Private interfaces of torch, diffusers and accelerate that this package uses, in one place.

Each function says why it is needed and since which version the interface exists.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd


def addmm_gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``gelu(x @ weight + bias)``, with the GELU in the epilogue of the matrix product.

    No public function of torch exposes this epilogue of cuBLASLt. ``torch._addmm_activation``
    exists since torch 1.12. On CUDA it computes the tanh GELU, on a CPU the exact one.
    """
    return torch._addmm_activation(bias, x, weight, use_gelu=True)


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether ``layer`` is an ``nn.Linear`` with a bias that nothing wraps or hooks into.

    Adapters, quantizers and sharding replace the class of the layer or of its weight. Offloading
    replaces ``forward``: accelerate (since 0.8) marks such a layer with ``_hf_hook``, diffusers
    (since 0.33) with ``_diffusers_hook``. torch.compile recompiles when one of these two names
    appears, but not when ``forward`` alone changes. torch lists registered hooks only in
    ``_forward_hooks`` and ``_forward_pre_hooks`` (since 1.0).
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is not None
        and "forward" not in layer.__dict__
        and not (hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook"))
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def register_cacheable_block(block: type[nn.Module]) -> None:
    """Declare that the first output of this transformer block is its hidden states.

    First-block cache and MagCache look every block up in this registry of diffusers. It has no
    public entry point; it exists since diffusers 0.35.
    """
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))


def reset_cache(model: Any) -> None:
    """Empty the diffusers cache of ``model`` (such as a first-block cache) before new images.

    diffusers' own pipelines keep one cache per prompt instead, through ``cache_context``.
    ``CacheMixin._reset_stateful_cache`` exists since diffusers 0.33.
    """
    model._reset_stateful_cache()


def silence_empty_float32_warning() -> None:
    """Suppress diffusers' warning about "modules … that should be kept in float32: []".

    Since diffusers 0.40, ``ModelMixin.to`` prints it at every change of dtype, even if the model
    keeps no module in float32. Warnings that name a module are still printed.
    """
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_a_module)


def _names_a_module(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()


def norm_each(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, computed by few kernels.

    ``torch.nn.utils.get_total_norm`` returns only the total. ``torch._foreach_norm`` exists since
    torch 1.13.
    """
    return list(torch._foreach_norm(tensors))


def scale_all_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply all tensors in place by a scalar tensor, without waiting for the GPU.

    ``torch.nn.utils.clip_grads_with_norm_`` computes its own factor and takes no DTensor shards.
    ``torch._foreach_mul_`` accepts a scalar tensor since torch 2.1.
    """
    torch._foreach_mul_(tensors, factor)


def move_towards_(
    tensors: list[Tensor], targets: list[Tensor], factor: Tensor, skip: Tensor | None = None
) -> None:
    """Move all tensors in place towards ``targets`` by ``factor`` of the difference.

    This is gradient descent on ½‖tensor − target‖² with ``factor`` as learning rate. The fused SGD
    reads each tensor once, and reads the factor and the flag on the device.
    ``torch._foreach_lerp_`` takes the factor only from the host. ``torch.optim.sgd.sgd`` accepts
    ``found_inf`` since torch 2.2.

    Args:
        tensors, targets: tensors of equal shapes.
        factor: scalar tensor, float32 on a GPU.
        skip: float32 scalar; 1 leaves the tensors unchanged.
    """
    sgd(
        tensors, targets, [], fused=True, lr=factor, found_inf=skip, weight_decay=1.0,
        maximize=True, momentum=0.0, dampening=0.0, nesterov=False,
    )  # fmt: skip


def skip_update_if(
    optimizer: Any, condition: Tensor, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Let the next step of a fused optimizer leave weights and state unchanged if the flag is set.

    Fused optimizers read the flag from their attribute ``found_inf`` on the device, so the host
    need not wait for it. ``torch.amp.GradScaler`` sets this attribute since torch 2.0, from the
    flags that ``unscale_`` stores.

    Args:
        optimizer: a fused optimizer.
        condition: a scalar bool tensor on the device of the weights.
        scaler: the gradient scaler that runs the step; it has unscaled the gradients.
    """
    if scaler is None:
        optimizer.found_inf = condition.float()
    else:
        for flag in scaler._found_inf_per_device(optimizer).values():
            flag.copy_(torch.maximum(flag, condition.to(flag.dtype)))


def shut_down_workers(batches: Any) -> None:
    """End the worker processes of a ``DataLoader`` iterator now.

    Otherwise they end when the iterator is deleted, which a stored exception traceback can delay.
    ``_MultiProcessingDataLoaderIter._shutdown_workers`` exists since torch 1.2.
    """
    batches._shutdown_workers()


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and model outputs.

    torch has no public function for this. ``torch.utils._pytree.tree_leaves`` exists since torch
    2.2.
    """
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def execution_device(pipeline: Any) -> torch.device:
    """Return the device on which a diffusers pipeline computes, also while models are offloaded.

    The public ``pipeline.device`` is where the weights are, which offloading changes.
    ``DiffusionPipeline._execution_device`` exists since diffusers 0.12.
    """
    return pipeline._execution_device


def change_model_config(model: Any, **changes: Any) -> None:
    """Change arguments in the configuration of a diffusers model.

    ``from_config`` ignores arguments listed in ``_use_default_values`` (since diffusers 0.22), and
    the public ``register_to_config`` does not remove changed ones from this list.
    """
    defaults = set(model.config.get("_use_default_values", [])) - changes.keys()
    model.register_to_config(**changes, _use_default_values=sorted(defaults))


class UploadHook:
    """Base of a diffusers model or pipeline that changes its folder before it is uploaded.

    diffusers (since 0.19) uploads in ``push_to_hub`` and in ``save_pretrained(push_to_hub=True)``.
    Both call ``_upload_folder``, and there is no public method to prepare the folder.
    """

    def before_upload(self, folder: Path) -> None:
        """Prepare the saved folder for the upload."""

    def _upload_folder(self, working_dir: str | os.PathLike, *args: Any, **options: Any) -> Any:
        self.before_upload(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **options)  # type: ignore[misc]


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` such that torch.compile neither traces it nor the functions it calls.

    ``torch.compiler.disable`` does the same but imports the compiler at once, which takes seconds.
    ``torch._disable_dynamo`` imports it at the first call. It exists since torch 2.2.
    """
    return torch._disable_dynamo(function)


@contextmanager
def without_compiled_call(module: nn.Module) -> Iterator[bool]:
    """Let ``module`` run uncompiled inside the block; yield whether it was compiled.

    ``nn.Module.compile`` keeps the compiled call in ``_compiled_call_impl`` (since torch 2.2).
    There is no public way to undo it.
    """
    before = module._compiled_call_impl
    if before is None:
        yield False
        return
    module._compiled_call_impl = None
    try:
        yield True
    finally:
        module._compiled_call_impl = before


PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})
# Attributes that hooks of accelerate and diffusers set, see `is_plain_linear`.
REPLACED_BY_HOOKS = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward")


@lru_cache(maxsize=1024)
def _is_known(file: str) -> bool:
    """Return whether a file, such as ``torch.nn.functional``, is of torch or of this package."""
    return file.partition(".")[0] in ("torch", __name__.partition(".")[0])


def forward_state(module: nn.Module, calls_forward: bool = True) -> tuple[list[int], str | None]:
    """Return what the forward pass of ``module`` depends on, besides the values of its tensors.

    torch has no public function for this. Modules keep their parameters, buffers, children and
    hooks in dictionaries with these names since torch 1.0. ``_has_any_global_hook`` reports hooks
    of all modules since torch 1.9.

    Args:
        module: the module; its children are included.
        calls_forward: whether hooks and a replaced ``forward`` of ``module`` itself matter.

    Returns:
        ``(state, obstacle)``. The state holds the address of each parameter and buffer, and the
        identity of each module and attribute, so it differs after one of them was replaced. The
        obstacle describes a module whose forward pass may run Python code of others: a module with
        hooks, with a replaced ``forward``, with weights of a special type, or with a class of
        another package. It is ``None`` if there is none.
    """
    state: list[int] = []
    obstacle = "all modules have hooks" if nn.modules.module._has_any_global_hook() else None
    waiting: list[nn.Module | None] = [module]
    while waiting:  # as module.modules(), which takes four times as long
        part = waiting.pop()
        if part is None:
            continue
        attributes = part.__dict__
        if part is module and not calls_forward:
            attributes = {k: v for k, v in attributes.items() if k not in REPLACED_BY_HOOKS}
        found = None
        state.append(id(part))
        state.extend(map(id, attributes.values()))
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    state.append(tensor.data_ptr())
                    if type(tensor) not in PLAIN_TENSORS:
                        found = f"has weights of type {type(tensor).__name__}"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in attributes:
            found = "has a hook or a replaced forward method"
        if not _is_known(type(part).__module__):
            found = f"is a {type(part).__qualname__} of another package"
        if found is not None:
            name = next(name for name, each in module.named_modules() if each is part)
            obstacle = f"{name or 'the model'} {found}"
        waiting.extend(part._modules.values())
    return state, obstacle
