"""Clip the gradient and catch what is not finite, without making the GPU wait."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .sharding import local, sum_over_shards


class GradientWatch:
    """Holds back the update of a step whose loss or gradient is not finite.

    The decision is taken on the device: fused AdamW leaves weights and moments alone where its
    ``found_inf`` is 1. The verdict reaches the host one step later, when it is there anyway.

    Args:
        named_parameters: the trainable parameters, by name, as the optimizer holds them.
        optimizer: a fused ``torch.optim.AdamW``.
        max_grad_norm: clip the global norm to this; ``None`` for no clipping.
        term_names: what the loss terms are called, for the message.
        loss_scaled: fp16 with a gradient scaler, for which an overflow now and then is ordinary
            and which holds back such updates itself; reported is then a loss that is not finite,
            or ``PATIENCE`` overflows in a row: no scale is small enough.
    """

    PATIENCE = 50

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
        self.optimizer: Any = optimizer
        self.max_grad_norm = max_grad_norm
        self.term_names = term_names
        self.loss_scaled = loss_scaled
        cuda = self.parameters[0].is_cuda
        self._flag = torch.zeros((), dtype=torch.bool, pin_memory=cuda)
        self._arrived = torch.cuda.Event() if cuda else None
        self._pending: tuple[int, Tensor, Tensor] | None = None
        self._in_a_row = torch.zeros((), device=self.parameters[0].device)

    @torch.no_grad()
    def before_update(self, step: int, terms: Tensor) -> Tensor:
        """Clip; hold the update back if need be. Returns the gradient norm before clipping.

        Args:
            step: number of the step, for the message.
            terms: the step's loss terms, a vector; the same on every process, as the decision
                has to be.
        """
        gradients = [local(cast(Tensor, parameter.grad)) for parameter in self.parameters]
        norms = torch.stack(torch._foreach_norm(gradients))
        norms = sum_over_shards(norms.square(), self.parameters[0]).sqrt()
        norm = torch.linalg.vector_norm(norms)
        if self.max_grad_norm is not None:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        bad = ~terms.isfinite().all()
        if self.loss_scaled:
            self._in_a_row = (self._in_a_row + 1).where(~norm.isfinite(), 0)
            bad |= (self._in_a_row > 0) & (self._in_a_row % self.PATIENCE == 0)
        else:
            bad |= ~norm.isfinite()
            self.optimizer.found_inf = bad.float()
        self._flag.copy_(bad, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._pending = (step, norms, terms)
        return norm

    def verdict(self) -> str | None:
        """What was wrong with the last step seen, in words; ``None`` if nothing was.

        Call it when the next step has been queued: the GPU then has work while the host waits for
        the flag of the step before.
        """
        if self._pending is None:
            return None
        step, norms, terms = self._pending
        self._pending = None
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._flag:
            return None
        finite = norms.isfinite().tolist()
        layers = [name for name, good in zip(self.names, finite, strict=True) if not good]
        shown = ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        named = zip(self.term_names, terms.tolist(), strict=True)
        values = ", ".join(f"{name} {value:.4g}" for name, value in named)
        return f"step {step}: {values}; gradient not finite in {shown or 'no layer'}"


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first module in a forward pass whose output is not finite, if any."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not found and not all(tensor.isfinite().all() for tensor in tensors):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would not see the hooks
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
