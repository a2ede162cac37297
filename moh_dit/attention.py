"""Mixture-of-head attention: the mathematics, readable (MoH, arXiv 2410.11842, §3).

``MoHAttention`` is the definition that every kernel is held against. Heads ``0 … s-1`` are shared
(always active), the other ``E = h - s`` are routed; each token activates its top ``k`` of those.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .kernels import BACKENDS, attend_gathered, choose_backend, moh_attention_triton


class MoHAttention(nn.Module):
    """Multi-head self-attention in which every token chooses and weighs its heads.

    Args:
        dim: model width C.
        num_heads: heads h of the layer.
        num_shared_heads: shared heads s, ``0 ≤ s ≤ h``; ``None`` makes plain multi-head attention
            without a router (dense DiT; ``num_active_routed_heads`` is then ignored).
        num_active_routed_heads: routed heads k that each token activates, ``0 ≤ k ≤ h - s``.
            ``k = 0`` needs ``s = h``: gated, but every head active.
        head_dim: width d of a head; ``None`` means ``dim // num_heads``. ``h·d`` may differ from C.
        qkv_bias: whether the query/key/value projection has a bias.
        attention_backend: how a layer with a router computes, see :func:`moh_attention`; can be
            changed later through the attribute of that name.

    Raises:
        UserError: when the head plan does not add up or the backend is unknown.

    Parameter names are those of the published checkpoints: ``wg`` is W_routed (E, C), ``wg_0``
    W_stage (2, C) and ``wg_1`` W_shared (s, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared_heads: int | None = None,
        num_active_routed_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attention_backend: str = "auto",
    ):
        super().__init__()
        check_head_plan(dim, num_heads, num_shared_heads, num_active_routed_heads, head_dim)
        if attention_backend not in BACKENDS:
            raise UserError(
                f"attention_backend is {attention_backend!r}; choose one of {', '.join(BACKENDS)}"
            )
        self.attention_backend = attention_backend
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.num_shared_heads = num_shared_heads
        self.num_active_routed_heads = num_active_routed_heads or 0
        inner_dim = num_heads * self.head_dim

        self.qkv = nn.Linear(dim, 3 * inner_dim, bias=qkv_bias)
        self.proj = nn.Linear(inner_dim, dim)
        if num_shared_heads is not None:
            if num_shared_heads < num_heads:
                self.wg = nn.Linear(dim, num_heads - num_shared_heads, bias=False)
                if num_shared_heads > 0:
                    self.wg_0 = nn.Linear(dim, 2, bias=False)
            if num_shared_heads > 0:
                self.wg_1 = nn.Linear(dim, num_shared_heads, bias=False)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_shared_heads={self.num_shared_heads}, "
            f"num_active_routed_heads={self.num_active_routed_heads}, head_dim={self.head_dim}"
        )

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gates (B, N, h) and router_stats (2, E), see :func:`moh_gates`, for inputs (B, N, C)."""
        logits = F.linear(hidden_states, torch.cat(self.router_weights()))
        return moh_gates(
            logits, self.num_heads, self.num_shared_heads or 0, self.num_active_routed_heads
        )

    def router_weights(self) -> list[Tensor]:
        """W_shared (s, C), W_routed (E, C) and W_stage (2, C), as far as the layer has them."""
        names = ("wg_1", "wg", "wg_0")
        return [getattr(self, name).weight for name in names if hasattr(self, name)]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, N, C), any floating dtype.

        Returns:
            ``(output, router_stats)``: output (B, N, C) in the input's dtype; router_stats as in
            :func:`moh_gates`, ``None`` for a layer without routed heads.
        """
        if self.num_shared_heads is None:
            query, key, value = split_heads(self.qkv(hidden_states), self.num_heads, self.head_dim)
            output = F.scaled_dot_product_attention(query, key, value)
            return self.proj(output.transpose(1, 2).flatten(2)), None

        # The router maps ride along as extra rows of one product, padded so that rows of the result
        # are whole 128-byte lines: compilers would otherwise pad it themselves, by a copy.
        rows = [self.qkv.weight, *self.router_weights()]
        padding = -sum(map(len, rows)) % 64
        weight = torch.cat([*rows, rows[0].new_zeros(padding, self.qkv.in_features)])
        bias: Tensor | None = self.qkv.bias
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(len(weight) - len(bias))])
        projected = F.linear(hidden_states, weight, bias)
        output, router_stats = moh_attention(
            projected,
            self.num_heads,
            self.num_shared_heads,
            self.num_active_routed_heads,
            self.head_dim,
            self.attention_backend,
        )
        return self.proj(output), router_stats


def split_heads(projected: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries, keys, values (B, h, N, d) from the first 3·h·d columns of (B, N, ≥ 3·h·d)."""
    batch, tokens, _ = projected.shape
    qkv = projected[..., : 3 * num_heads * head_dim]
    return qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def moh_gates(logits: Tensor, heads: int, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
    """Gates and routing statistics (MoH §3) from router logits.

    Args:
        logits: (B, N, ≥ h, or h + 2 where there are shared and routed heads), columns W_shared x,
            W_routed x, W_stage x; whatever follows is ignored.
        heads, shared: h and s.
        active: routed heads k that each token activates, 0 for none. Of equal scores the lowest
            head wins, in every backend.

    Returns:
        ``gates`` (B, N, h), at least float32, zero where a head is not selected, with mean 1
        over the shared and over the active routed heads (twice that share of α where both
        exist); ``router_stats`` (2, E): the share f of tokens that selected each routed head
        and its mean score P̄ (the gradient flows through P̄ alone), ``None`` without routed
        heads. Both are batch means, so processes of equal batch size average them.
    """
    # Softmax in bf16 would quantise the gates to 8 bits: at least float32 from here.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    shared_gates = routed_gates = router_stats = None
    if shared > 0:
        shared_gates = shared * logits[..., :shared].softmax(-1)  # S
    if active > 0:
        scores = logits[..., shared:heads].softmax(-1)  # P
        order = logits[..., shared:heads].argsort(dim=-1, descending=True, stable=True)
        selected = torch.zeros_like(scores).scatter(-1, order[..., :active], 1.0)  # M
        kept = scores * selected
        routed_gates = active * kept / kept.sum(-1, keepdim=True)  # R; the sum is at least 1/E
        router_stats = torch.stack([selected.flatten(0, -2).mean(0), scores.flatten(0, -2).mean(0)])

    if shared_gates is None:
        assert routed_gates is not None
        return routed_gates, router_stats
    if routed_gates is None:
        return shared_gates, router_stats
    alpha = 2 * logits[..., heads : heads + 2].softmax(-1)  # two-stage α
    gates = torch.cat([alpha[..., :1] * shared_gates, alpha[..., 1:] * routed_gates], dim=-1)
    return gates, router_stats


def moh_attention(
    projected: Tensor,
    heads: int,
    shared: int,
    active: int,
    head_dim: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mixture-of-head attention between its two projections (MoH §3).

    Args:
        projected: (B, N, 3·h·d + router columns): queries, keys, values (each h·d), then router
            logits as in :func:`moh_gates`, then any padding.
        heads, shared, active, head_dim: h, s, k, d.
        backend: "reference" (dense attention, then the gates), "triton" (GPU: only selected
            queries, gates fused; float32, float16, bfloat16), "gathered" (only selected queries,
            in plain torch, made for CPUs), or "auto", the fastest by measurement.

    Returns:
        ``(output, router_stats)``: Σ is left to the output projection, so output is
        (B, N, h·d) with ``g_i o_i`` for each head; router_stats as in :func:`moh_gates`.

    Raises:
        UserError: when the backend is unknown or cannot run on this device or dtype.
    """
    backend = choose_backend(backend, projected, heads, shared, active, head_dim)
    if backend == "triton":
        return moh_attention_triton(projected, heads, shared, active, head_dim)
    query, key, value = split_heads(projected, heads, head_dim)
    gates, router_stats = moh_gates(projected[..., 3 * heads * head_dim :], heads, shared, active)
    if backend == "gathered":
        return attend_gathered(query, key, value, gates, shared), router_stats
    output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # (B, N, h, d)
    output = output * gates.to(output.dtype).unsqueeze(-1)
    return output.flatten(2), router_stats


def load_balance_loss(
    router_stats: Sequence[Tensor], num_active_routed_heads: list[int], published: bool = False
) -> Tensor:
    """Mean over routed layers of the load-balance term (MoH eq. 8), as a scalar.

    Args:
        router_stats: (2, E) of each routed layer, f and P̄, averaged over as large a batch as the
            caller likes (all processes, all micro-steps).
        num_active_routed_heads: k of the same layers.
        published: the published scale, ``L_b = E Σ f_i P̄_i``, which is k at even routing, so that
            layers of different k weigh differently. Default: ``L_b / k``, 1 at even routing
            whatever the mix.
    """
    terms = [
        len(f) * (f * p).sum() / (1 if published else k)
        for (f, p), k in zip(router_stats, num_active_routed_heads, strict=True)
    ]
    return torch.stack(terms).mean()


def check_head_plan(
    dim: int, num_heads: int, shared: int | None, active: int | None, head_dim: int | None
) -> None:
    """Raise ``UserError`` unless one layer's heads add up."""
    if num_heads < 1:
        raise UserError(f"num_heads is {num_heads}; a layer needs at least one head")
    if head_dim is None and dim % num_heads:
        raise UserError(f"width {dim} is not divisible by num_heads {num_heads}; set head_dim")
    if head_dim is not None and head_dim < 1:
        raise UserError(f"head_dim is {head_dim}; it must be at least 1")
    if shared is None:
        if active:
            raise UserError(
                f"num_active_routed_heads is {active} but num_shared_heads is not set; "
                "give num_shared_heads (0 for none), or neither for dense attention"
            )
        return
    active = active or 0
    if not 0 <= shared <= num_heads:
        raise UserError(f"num_shared_heads is {shared}; it must lie in 0 … num_heads ({num_heads})")
    if not 0 <= active <= num_heads - shared:
        raise UserError(
            f"num_active_routed_heads is {active}, but {num_heads} heads with {shared} shared "
            f"leave {num_heads - shared} to route over"
        )
    if active == 0 and shared < num_heads:
        raise UserError(
            f"num_active_routed_heads is 0 with {num_heads - shared} routed heads, which no token "
            f"could ever use; set num_shared_heads to {num_heads} or activate at least one"
        )
