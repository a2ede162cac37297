"""Queries, keys, values and router logits as one product."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound="JointProjection")


class JointProjection(nn.Module):
    """The part of :class:`moh_dit.MoHAttention` that multiplies by ``qkv`` and the routers."""

    qkv: nn.Linear
    fused_weight: Tensor | None
    fused_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    def router_weights(self) -> list[Tensor]:
        """W_shared (s, C), W_routed (E, C) and W_stage (2, C), as far as the layer has them."""
        names = ("wg_1", "wg", "wg_0")
        return [getattr(self, name).weight for name in names if hasattr(self, name)]

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Join ``qkv`` and the routers once, not in every pass, for passes without gradients.

        The layer keeps the copy, a weight (columns, C) and its bias, beside its parameters and out
        of its state dict; one without router weights has nothing to join. ``train()``, loading a
        state dict into the layer and :meth:`unfuse_projections` drop it. Weights that change
        otherwise, as in place by an optimizer or an average, it does not follow: call this again.
        """
        if self.router_weights():
            self.fused_weight, self.fused_bias = self._join()

    def unfuse_projections(self) -> None:
        """Drop what :meth:`fuse_projections` keeps."""
        self.fused_weight = self.fused_bias = None

    def train(self: Layer, mode: bool = True) -> Layer:
        if mode:
            self.unfuse_projections()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfuse_projections()
        super()._load_from_state_dict(*args, **kwargs)

    def _project(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) → (B, N, columns), see :func:`moh_dit.model.attention.moh_attention`."""
        if self.fused_weight is not None and not torch.is_grad_enabled():
            return F.linear(hidden_states, self.fused_weight, self.fused_bias)
        if not self.router_weights():
            return self.qkv(hidden_states)
        return F.linear(hidden_states, *self._join())

    def _join(self) -> tuple[Tensor, Tensor | None]:
        # The router maps ride along as extra rows of one product, padded so that rows of the result
        # are whole 128-byte lines: compilers would otherwise pad it themselves, by a copy.
        rows = [self.qkv.weight, *self.router_weights()]
        padding = -sum(map(len, rows)) % 64
        weight = torch.cat([*rows, rows[0].new_zeros(padding, self.qkv.in_features)])
        bias: Tensor | None = self.qkv.bias
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
        return weight, bias
