"""Mixture-of-head attention: the mathematics, readable (MoH, arXiv 2410.11842, §3).

``MoHAttention`` is the definition that every kernel is held against. Heads ``0 … s-1`` are shared
(always active), the other ``E = h - s`` are routed; each token activates its top ``k`` of those.
The layer stands alone, too: with masks, rotary embeddings, grouped keys and a cache it takes the
place of attention in other transformers (``examples/``).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..kernels.backends import BACKENDS, check_choice, choose_backend
from ..kernels.gathered import attend_gathered
from .projection import JointProjection
from .routing import ROUTERS, check_head_plan, load_balance_loss, moh_gates, query_norm_gates

__all__ = [
    "MoHAttention",
    "load_balance_loss",
    "moh_attention",
    "moh_gates",
    "query_norm_gates",
    "recorded_router_stats",
]

Pair = tuple[Tensor, Tensor]


class MoHAttention(JointProjection):
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
        router: "learned" (MoH §3), or "query_norm" (§4.4): no parameters, see
            :func:`query_norm_gates`; computed by "reference" or "gathered", on a GPU by the former.
        num_key_value_heads: keys and values that the heads share in groups (arXiv 2305.13245), a
            divisor of h; ``None`` means one for each head.
        proj_bias: whether the output projection has a bias.

    Raises:
        UserError: when the head plan does not add up or the backend or router is unknown.

    Parameter names are those of the published checkpoints: ``wg`` is W_routed (E, C), ``wg_0``
    W_stage (2, C) and ``wg_1`` W_shared (s, C). ``qkv`` holds the rows of all queries, then keys,
    then values. With grouped keys the buffer ``key_value_head`` (h,) says whose keys a head asks.
    """

    key_value_head: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared_heads: int | None = None,
        num_active_routed_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attention_backend: str = "auto",
        router: str = "learned",
        num_key_value_heads: int | None = None,
        proj_bias: bool = True,
    ):
        super().__init__()
        check_head_plan(dim, num_heads, num_shared_heads, num_active_routed_heads, head_dim)
        check_choice("attention_backend", attention_backend, BACKENDS)
        check_choice("router", router, ROUTERS)
        key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if key_value_heads < 1 or num_heads % key_value_heads:
            raise UserError(
                f"num_key_value_heads is {key_value_heads}; it must divide num_heads {num_heads}"
            )
        self.attention_backend = attention_backend
        self.router = router
        self.num_heads = num_heads
        self.num_key_value_heads = key_value_heads
        self.head_dim = head_dim or dim // num_heads
        self.num_shared_heads = num_shared_heads
        self.num_active_routed_heads = num_active_routed_heads or 0

        rows = (num_heads + 2 * key_value_heads) * self.head_dim
        self.qkv = nn.Linear(dim, rows, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)
        if key_value_heads < num_heads:
            groups = torch.arange(num_heads) // (num_heads // key_value_heads)
            self.register_buffer("key_value_head", groups)
        if num_shared_heads is not None and router == "learned":
            if num_shared_heads < num_heads:
                self.wg = nn.Linear(dim, num_heads - num_shared_heads, bias=False)
                if num_shared_heads > 0:
                    self.wg_0 = nn.Linear(dim, 2, bias=False)
            if num_shared_heads > 0:
                self.wg_1 = nn.Linear(dim, num_shared_heads, bias=False)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_shared_heads={self.num_shared_heads}, "
            f"num_active_routed_heads={self.num_active_routed_heads}, head_dim={self.head_dim}, "
            f"num_key_value_heads={self.num_key_value_heads}, router={self.router!r}"
        )

    def route(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gates (B, N, h) and router_stats (2, E) for inputs (B, N, C); ``None`` without router."""
        if not (routers := self.router_weights()):
            return self._gates(self.qkv(hidden_states))
        logits = F.linear(hidden_states, torch.cat(routers))
        return moh_gates(
            logits, self.num_heads, self.num_shared_heads or 0, self.num_active_routed_heads
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: Callable[[Tensor, Tensor], Pair] | None = None,
        cache: Callable[[Tensor, Tensor], Pair] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, N, C), any floating dtype.
            attention_mask: broadcastable to (B, h, N, M) over M keys, those of the cache included:
                true where a query may look, or a floating-point number to add to the scores.
            is_causal: whether a token sees only itself and earlier ones; the N queries are the last
                of the M tokens. Adds to ``attention_mask``.
            rotary: hook for relative positions: takes queries (B, h, N, d) and keys
                (B, key-value heads, N, d), returns both. The router reads the queries before it.
            cache: hook for generation: takes the keys and values of these N tokens
                (B, key-value heads, N, d), returns those of all M tokens.

        Returns:
            ``(output, router_stats)``: output (B, N, C) in the input's dtype; router_stats as in
            :func:`moh_gates`, ``None`` for a layer without routed heads.
        """
        projected = self._project(hidden_states)
        plan = self.num_heads, self.num_shared_heads or 0, self.num_active_routed_heads
        plain = attention_mask is None and not is_causal and rotary is None and cache is None
        fused = self.num_shared_heads is not None and self.router == "learned"
        if plain and fused and self.num_key_value_heads == self.num_heads:
            output, router_stats = moh_attention(
                projected, *plan, self.head_dim, self.attention_backend
            )
            return self.proj(output), router_stats

        gates, router_stats = self._gates(projected)
        query, key, value = self._split(projected)
        if rotary is not None:
            query, key = rotary(query, key)
        if cache is not None:
            key, value = cache(key, value)
        if self.num_key_value_heads < self.num_heads:
            key, value = key[:, self.key_value_head], value[:, self.key_value_head]
        mask, is_causal = merge_masks(attention_mask, is_causal, query, key)
        backend = "reference"
        if gates is not None:
            backend = choose_backend(self.attention_backend, projected, *plan, self.head_dim)
        if backend == "triton":
            if self.attention_backend != "auto":
                raise UserError(
                    'attention_backend "triton" has no kernels for masks, hooks, grouped keys or '
                    'the query-norm router; use "auto"'
                )
            backend = "reference"
        output = attend(query, key, value, gates, plan[1], backend, mask, is_causal)
        return self.proj(output), router_stats

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        return split_heads(projected, self.num_heads, self.head_dim, self.num_key_value_heads)

    def _gates(self, projected: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.num_shared_heads is None:
            return None, None
        shared, active = self.num_shared_heads, self.num_active_routed_heads
        if self.router == "query_norm":
            return query_norm_gates(self._split(projected)[0], shared, active)
        logits = projected[..., self.qkv.out_features :]
        return moh_gates(logits, self.num_heads, shared, active)


def split_heads(
    projected: Tensor, num_heads: int, head_dim: int, num_key_value_heads: int | None = None
) -> tuple[Tensor, ...]:
    """Queries, keys, values (B, their heads, N, d) from the first columns of (B, N, columns)."""
    batch, tokens, _ = projected.shape
    if num_key_value_heads not in (None, num_heads):
        sizes = [num_heads, num_key_value_heads, num_key_value_heads]
        qkv = projected[..., : sum(sizes) * head_dim].unflatten(-1, (-1, head_dim))
        return qkv.transpose(1, 2).split(sizes, dim=1)
    qkv = projected[..., : 3 * num_heads * head_dim]
    return qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


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
        from ..kernels.ops import moh_attention_triton  # imports Triton

        return moh_attention_triton(projected, heads, shared, active, head_dim)
    query, key, value = split_heads(projected, heads, head_dim)
    gates, router_stats = moh_gates(projected[..., 3 * heads * head_dim :], heads, shared, active)
    return attend(query, key, value, gates, shared, backend), router_stats


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    shared: int,
    backend: str = "reference",
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``g_i o_i`` of every head (B, N, h·d) by "reference" or "gathered"; all g = 1 if ``None``."""
    if gates is not None and backend == "gathered":
        return attend_gathered(query, key, value, gates, shared, mask, is_causal)
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    output = output.transpose(1, 2)  # (B, N, h, d)
    if gates is not None:
        output = output * gates.to(output.dtype).unsqueeze(-1)
    return output.flatten(2)


def merge_masks(
    mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Tensor | None, bool]:
    """One mask or the causal flag, whichever says it: torch takes one, and aligns it top left."""
    tokens, keys = query.shape[2], key.shape[2]
    if not is_causal or (mask is None and tokens == keys):
        return mask, is_causal
    if tokens == 1:  # the last token sees all
        return mask, False
    past = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if mask is None:
        return past, False
    return (mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)), False


@contextmanager
def recorded_router_stats(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect router_stats (2, E) of the routed layers in a model whose blocks drop them.

        with recorded_router_stats(model) as stats:
            loss = model(inputs).loss
        loss = loss + 0.01 * load_balance_loss(stats, [2] * len(stats))

    In the order in which the layers run, each time one runs inside the block.

    Raises:
        UserError: where activation checkpointing is re-entrant, which would cut the gradient.
    """
    stats: list[Tensor] = []
    learning = torch.is_grad_enabled()

    def record(layer: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is None:
            return
        if learning and not torch.is_grad_enabled():
            raise UserError(
                "router statistics lose their gradient under re-entrant activation checkpointing; "
                "set use_reentrant=False"
            )
        stats.append(output[1])

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, MoHAttention):
                hooks.callback(module.register_forward_hook(record).remove)
        yield stats
