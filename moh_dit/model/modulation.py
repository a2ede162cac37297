"""adaLN-Zero (DiT §3.2): what lies between the residual stream and a block's attention and MLP."""

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
    """Add a branch to the stream, and normalise and modulate what the next one reads of it.

    Args:
        x: the residual stream (B, N, C).
        shift, scale: of the next branch, (B, 1, C).
        gate, branch: (B, 1, C) and (B, N, C) of the branch before; ``None``: nothing is added.
        backend: "reference" (takes whatever broadcasts), "triton" (GPU: one pass each way; float32,
            float16, bfloat16), or "auto", the fastest by measurement.

    Returns:
        ``r = x + gate·branch`` and ``LN(r)·(1 + scale) + shift``; the latter, from "triton", in the
        dtype of ``shift``, as a linear layer under autocast would round it.

    Raises:
        UserError: when the backend is unknown or cannot run on this device, dtype or shape, or a
            gate comes without a branch.
    """
    if (gate is None) != (branch is None):
        raise UserError("adaln takes gate and branch together, or neither")
    if choose_modulation_backend(backend, x, shift, scale, gate, branch) == "triton":
        from ..kernels.triton_adaln import AdaLN  # imports Triton

        return AdaLN.apply(x, gate, branch, shift, scale)
    if gate is not None and branch is not None:
        x = x + gate * branch
    return x, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON) * (1 + scale) + shift
