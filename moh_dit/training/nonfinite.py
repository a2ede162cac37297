"""Clip the gradient and skip updates that are not finite, without waiting for the GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..common.compat import norm_each, scale_all_, skip_update_if, tensors_in
from .sharding import local_shard, sum_over_shards


class GradientNorms(NamedTuple):
    """Gradient norms of one step, and what follows from them, on the device."""

    total: Tensor  # scalar, before clipping
    each: Tensor  # one per parameter
    nonfinite: Tensor  # bool scalar, whether loss or gradient must be reported
    skip: Tensor  # float32 scalar, 1 if the step changes no weights


class NonFiniteGuard:
    """Skips the update of a step whose loss or gradient is NaN or infinite.

    The device decides: fused AdamW leaves weights and moments unchanged when a flag on the device
    is set. The host reads the flag one step later, when the copy has already arrived.

    Args:
        named_parameters: the trainable parameters by name, as the optimizer holds them.
        optimizer: a fused ``torch.optim.AdamW``.
        max_grad_norm: clip the global norm to this value; ``None`` for no clipping.
        term_names: names of the loss terms, for the message.
        stop: also skip all later updates, because the host stops the run one step later.
        scaler: the gradient scaler of fp16. It skips updates itself, and occasional overflows are
            normal. Only a loss that is not finite is then reported, or ``MAX_OVERFLOWS`` overflows
            in a row, because then no loss scale is small enough.
    """

    MAX_OVERFLOWS = 50

    def __init__(
        self,
        named_parameters: list[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        term_names: tuple[str, ...],
        stop: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.term_names = term_names
        self.stop, self.scaler = stop, scaler
        device = self.parameters[0].device
        cuda = device.type == "cuda"
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=cuda)
        self._flag_copied = torch.cuda.Event() if cuda else None
        self._pending: tuple[int, Tensor, Tensor] | None = None
        self._overflows_in_a_row = torch.zeros((), device=device)
        self._held = torch.zeros((), dtype=torch.bool, device=device)  # skips every update

    @torch.no_grad()
    def before_update(self, terms: Tensor) -> GradientNorms:
        """Clip the gradient, and skip the next update if loss or gradient are not finite.

        Args:
            terms: loss terms of the step, a vector. It must be the same on all ranks, so that all
                take the same decision.
        """
        gradients = [local_shard(cast(Tensor, parameter.grad)) for parameter in self.parameters]
        norms = torch.stack(norm_each(gradients))
        norms = sum_over_shards(norms.square(), self.parameters[0]).sqrt()
        norm = torch.linalg.vector_norm(norms)
        if self.max_grad_norm is not None:
            scale_all_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        nonfinite = ~terms.isfinite().all()
        overflow = ~norm.isfinite()
        if self.scaler is not None:
            overflows = (self._overflows_in_a_row + 1).where(overflow, 0)
            self._overflows_in_a_row.copy_(overflows)
            nonfinite |= (overflows > 0) & (overflows % self.MAX_OVERFLOWS == 0)
        else:
            nonfinite |= overflow
        held = self._held | nonfinite
        if self.stop:
            self._held.copy_(held)
        skip_update_if(self.optimizer, held, self.scaler)
        return GradientNorms(norm, norms, nonfinite, (held | overflow).float())

    @contextmanager
    def hold_updates(self) -> Iterator[None]:
        """Skip all updates in this block, and leave the loss scale as it was before."""
        held, overflows = self._held.clone(), self._overflows_in_a_row.clone()
        scale = self.scaler.state_dict() if self.scaler is not None else {}
        self._held.fill_(True)
        try:
            yield
        finally:
            self._held.copy_(held)
            self._overflows_in_a_row.copy_(overflows)
            if self.scaler is not None:
                self.scaler.load_state_dict(scale)

    def record(self, step: int, nonfinite: Tensor, norms: Tensor, terms: Tensor) -> None:
        """Start copying the flag of a step to the host, and keep what a report needs.

        Args:
            step: number of the step, for the message.
            nonfinite, norms: flag and norms of each parameter, of :class:`GradientNorms`.
            terms: loss terms of the step.
        """
        self._flag.copy_(nonfinite, non_blocking=True)
        if self._flag_copied is not None:
            self._flag_copied.record()
        # The next replay of a CUDA graph overwrites its results.
        self._pending = (step, norms.clone(), terms.clone())

    def describe_last_step(self) -> str | None:
        """Describe what was not finite in the last step; ``None`` if everything was finite.

        Call this after queueing the next step, so that the GPU has work while the host waits for
        the flag of the last step.
        """
        if self._pending is None:
            return None
        step, norms, terms = self._pending
        self._pending = None
        if self._flag_copied is not None:
            self._flag_copied.synchronize()
        if not self._flag:
            return None
        finite = norms.isfinite().tolist()
        layers = [name for name, good in zip(self.names, finite, strict=True) if not good]
        first = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        named = zip(self.term_names, terms.tolist(), strict=True)
        values = ", ".join(f"{name} {value:.4g}" for name, value in named)
        return f"step {step}: {values}; gradient not finite in {first or 'no layer'}"


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Return the name of the first module whose output is not finite in a forward pass.

    Args:
        model: the model.
        forward: runs the forward pass.

    Returns:
        The name, or ``None`` if all outputs are finite.
    """
    found: list[str] = []

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in tensors_in(output)):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(make_hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would skip the hooks
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
