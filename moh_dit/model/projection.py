"""Compute queries, keys, values and router logits in one matrix product."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", bound="JointProjection")


class JointProjection(nn.Module):
    """Base of :class:`moh_dit.MoHAttention` that multiplies by ``qkv`` and the router weights."""

    qkv: nn.Linear
    fused_weight: Tensor | None
    fused_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        self.register_load_state_dict_pre_hook(_discard_fused_weights)

    def router_weights(self) -> list[Tensor]:
        """Return those of W_shared (s, C), W_routed (E, C), W_stage (2, C) that the layer has."""
        names = ("wg_1", "wg", "wg_0")
        return [getattr(self, name).weight for name in names if hasattr(self, name)]

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Concatenate the weights of ``qkv`` and the routers once, for passes without gradients.

        Without this call, every pass concatenates them. The layer keeps the copy in two buffers
        outside its state dict; a layer without router weights needs none. The copy is discarded by
        ``train()``, ``load_state_dict`` and :meth:`unfuse_projections`. After any other change of
        the weights, such as an optimizer step or an EMA update in place, call this method again.
        """
        if self.router_weights():
            self.fused_weight, self.fused_bias = self._concatenate()

    def unfuse_projections(self) -> None:
        """Discard the copy that :meth:`fuse_projections` made."""
        self.fused_weight = self.fused_bias = None

    def train(self: Layer, mode: bool = True) -> Layer:
        if mode:
            self.unfuse_projections()
        return super().train(mode)

    def _project(self, hidden_states: Tensor) -> Tensor:
        """Return (B, N, columns), see :func:`moh_dit.model.attention.moh_attention`."""
        if self.fused_weight is not None and not torch.is_grad_enabled():
            return F.linear(hidden_states, self.fused_weight, self.fused_bias)
        if not self.router_weights():
            return self.qkv(hidden_states)
        return F.linear(hidden_states, *self._concatenate())

    def _concatenate(self) -> tuple[Tensor, Tensor | None]:
        # Rows of the product are padded to a multiple of 128 bytes. Without this padding,
        # torch.compile would pad them itself, by an extra copy.
        rows = [self.qkv.weight, *self.router_weights()]
        padding = -sum(map(len, rows)) % 64
        weight = torch.cat([*rows, rows[0].new_zeros(padding, self.qkv.in_features)])
        bias: Tensor | None = self.qkv.bias
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
        return weight, bias


def _discard_fused_weights(layer: nn.Module, *_: Any) -> None:
    layer.unfuse_projections()  # type: ignore[operator]
