"""Compute adaLN-Zero (DiT §3.2): modulated norms and gated residuals around attention and MLP."""

import torch.nn.functional as F
from torch import Tensor

from ..common.errors import UserError
from ..kernels.backends import LAYER_NORM_EPSILON, choose_modulation_backend


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream, then normalize and modulate the sum.

    Args:
        x: the residual stream (B, N, C).
        shift, scale: modulation of the branch that follows, (B, 1, C).
        gate, branch: gate (B, 1, C) and output (B, N, C) of the branch before. If both are
            ``None``, nothing is added.
        backend: "reference" (any shapes that broadcast), "triton" (GPU; one pass over the tokens
            per direction; float32, float16, bfloat16), or "auto", the fastest by measurement.

    Returns:
        ``r = x + gate·branch`` in the dtype of ``x``, and ``LN(r)·(1 + scale) + shift``. The
        "triton" backend returns the latter in the dtype of ``shift``, to which a linear layer under
        autocast would round it anyway.

    Raises:
        UserError: if the backend is unknown or cannot run on this device, dtype or shape, or if
            only one of ``gate`` and ``branch`` is given.
    """
    if (gate is None) != (branch is None):
        raise UserError("adaln takes gate and branch together, or neither of them")
    if choose_modulation_backend(backend, x, shift, scale, gate, branch) == "triton":
        from ..kernels.triton_adaln import AdaLN  # imports triton, which is optional

        return AdaLN.apply(x, gate, branch, shift, scale)
    if gate is not None and branch is not None:
        x = x + gate * branch
    return x, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON) * (1 + scale) + shift
