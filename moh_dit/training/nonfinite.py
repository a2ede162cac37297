"""Clip the gradient and skip updates that are not finite, without waiting for the GPU."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..common.compat import norm_each, scale_all_, skip_update_if, tensors_in
from .sharding import local_shard, sum_over_shards


class NonFiniteGuard:
    """Skips the update of a step whose loss or gradient is NaN or infinite.

    The device decides: fused AdamW leaves weights and moments unchanged when a flag on the device
    is set. The host reads the flag one step later, when the copy has already arrived.

    Args:
        named_parameters: the trainable parameters by name, as the optimizer holds them.
        optimizer: a fused ``torch.optim.AdamW``.
        max_grad_norm: clip the global norm to this value; ``None`` for no clipping.
        term_names: names of the loss terms, for the message.
        loss_scaled: a gradient scaler (fp16) is active. It skips updates itself, and occasional
            overflows are normal. Only a loss that is not finite is then reported, or
            ``MAX_OVERFLOWS`` overflows in a row, because then no loss scale is small enough.
    """

    MAX_OVERFLOWS = 50

    def __init__(
        self,
        named_parameters: list[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        term_names: tuple[str, ...],
        loss_scaled: bool = False,
    ):
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.term_names = term_names
        self.loss_scaled = loss_scaled
        cuda = self.parameters[0].is_cuda
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=cuda)
        self._flag_copied = torch.cuda.Event() if cuda else None
        self._pending: tuple[int, Tensor, Tensor] | None = None
        self._overflows_in_a_row = torch.zeros((), device=self.parameters[0].device)

    @torch.no_grad()
    def before_update(self, step: int, terms: Tensor) -> Tensor:
        """Clip the gradient, and skip the next update if loss or gradient are not finite.

        Args:
            step: number of the step, for the message.
            terms: loss terms of the step, a vector. It must be the same on all ranks, so that all
                take the same decision.

        Returns:
            The global gradient norm before clipping, a scalar.
        """
        gradients = [local_shard(cast(Tensor, parameter.grad)) for parameter in self.parameters]
        norms = torch.stack(norm_each(gradients))
        norms = sum_over_shards(norms.square(), self.parameters[0]).sqrt()
        norm = torch.linalg.vector_norm(norms)
        if self.max_grad_norm is not None:
            scale_all_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        nonfinite = ~terms.isfinite().all()
        if self.loss_scaled:
            overflows = (self._overflows_in_a_row + 1).where(~norm.isfinite(), 0)
            self._overflows_in_a_row = overflows
            nonfinite |= (overflows > 0) & (overflows % self.MAX_OVERFLOWS == 0)
        else:
            nonfinite |= ~norm.isfinite()
            skip_update_if(self.optimizer, nonfinite)
        self._flag.copy_(nonfinite, non_blocking=True)
        if self._flag_copied is not None:
            self._flag_copied.record()
        self._pending = (step, norms, terms)
        return norm

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
