"""Compute mixture-of-head attention in plain torch (MoH, arXiv 2410.11842, §3).

``MoHAttention`` is the definition: a kernel is correct if it agrees with it. Heads ``0 … s-1`` are
shared (always active), the other ``E = h - s`` are routed. Each token activates its top ``k``
routed heads. With masks, rotary embeddings, grouped keys and a key-value cache, the layer also
replaces attention in other transformers (``examples/``).
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
from .routing import ROUTERS, check_head_plan, moh_gates, query_norm_gates
from .routing import load_balance_loss as load_balance_loss  # for users of recorded_router_stats

Pair = tuple[Tensor, Tensor]


class MoHAttention(JointProjection):
    """Multi-head self-attention in which every token chooses and weighs its heads.

    Args:
        dim: model width C.
        num_heads: number of heads h.
        num_shared_heads: number of shared heads s, ``0 ≤ s ≤ h``. ``None`` makes the layer plain
            multi-head attention without a router, as in a dense DiT.
        num_active_routed_heads: number of routed heads k that each token activates,
            ``0 ≤ k ≤ h - s``. ``k = 0`` requires ``s = h``: every head is active and has a gate.
        head_dim: width d of a head; ``None`` means ``dim // num_heads``. ``h·d`` may differ from C.
        qkv_bias: whether the query/key/value projection has a bias.
        attention_backend: backend of a layer with a router, see :func:`moh_attention`. The
            attribute of the same name can be changed later.
        router: "learned" (MoH §3), or "query_norm" (§4.4, without parameters, see
            :func:`query_norm_gates`). The Triton kernels compute only "learned".
        num_key_value_heads: number of key/value heads, a divisor of h. Each serves a group of
            query heads (grouped-query attention, arXiv 2305.13245). ``None`` means h.
        proj_bias: whether the output projection has a bias.

    Raises:
        UserError: if the numbers of heads are inconsistent, or the backend or router is unknown.

    Parameters are named as in the published checkpoints: ``wg`` is W_routed (E, C), ``wg_0``
    W_stage (2, C) and ``wg_1`` W_shared (s, C). The rows of ``qkv`` are all queries, then all keys,
    then all values. With grouped keys, the buffer ``key_value_head`` (h,) holds the key/value head
    of each query head.
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
        """Return gates (B, N, h) and router_stats (2, E) for inputs (B, N, C).

        Both are ``None`` for a layer without a router; router_stats are ``None`` without routed
        heads.
        """
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
        """Apply the layer.

        Args:
            hidden_states: (B, N, C), any floating-point dtype.
            attention_mask: broadcastable to (B, h, N, M) over M keys, including cached ones. A
                boolean mask is true where a query may attend; a floating-point mask is added to the
                scores.
            is_causal: whether a token attends only to itself and earlier tokens. The N queries are
                the last N of the M tokens. Combined with ``attention_mask`` if both are given.
            rotary: function for rotary embeddings. Takes queries (B, h, N, d) and keys
                (B, key-value heads, N, d) and returns both. The query-norm router reads the queries
                before it.
            cache: function for a key-value cache. Takes the keys and values of these N tokens
                (B, key-value heads, N, d) and returns the keys and values of all M tokens.

        Returns:
            ``(output, router_stats)``: output (B, N, C) in the input's dtype; router_stats as in
            :func:`moh_gates`, ``None`` for a layer without routed heads.

        Raises:
            UserError: if the backend cannot run on this device or dtype, or is "triton" where the
                Triton kernels do not apply (masks, hooks, grouped keys, query-norm router).
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
    """Split the first columns of (B, N, columns) into queries, keys and values (B, heads, N, d)."""
    batch, tokens, _ = projected.shape
    if num_key_value_heads not in (None, num_heads):
        sizes = [num_heads, num_key_value_heads, num_key_value_heads]
        qkv = projected[..., : sum(sizes) * head_dim].unflatten(-1, (-1, head_dim))
        return qkv.transpose(1, 2).split(sizes, dim=1)
    qkv = projected[..., : 3 * num_heads * head_dim]
    return qkv.reshape(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def moh_attention(
    projected: Tensor, heads: int, shared: int, active: int, head_dim: int, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Compute gated attention from the projected inputs, without the output projection (MoH §3).

    Args:
        projected: (B, N, 3·h·d + router columns): queries, keys, values (h·d columns each), then
            router logits as in :func:`moh_gates`, then any padding.
        heads, shared, active, head_dim: h, s, k, d.
        backend: "reference" (dense attention, then the gates), "triton" (GPU; only selected
            queries, gates fused; float32, float16, bfloat16), "gathered" (only selected queries,
            in plain torch, for CPUs), or "auto", the fastest by measurement.

    Returns:
        ``(output, router_stats)``: output (B, N, h·d) holds ``g_i o_i`` of every head, which the
        output projection sums; router_stats as in :func:`moh_gates`.

    Raises:
        UserError: if the backend is unknown or cannot run on this device or dtype.
    """
    backend = choose_backend(backend, projected, heads, shared, active, head_dim)
    if backend == "triton":
        # Imported here, because it imports triton, which is optional.
        from ..kernels.attention_operators import moh_attention_triton

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
    """Return ``g_i o_i`` of every head (B, N, h·d), by "reference" or "gathered".

    Without gates (``None``), every g is 1.
    """
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
    """Merge the mask and the causal flag into one of them, because torch accepts only one.

    torch aligns its causal mask at the first key. Here, the last query is aligned with the last
    key, so a cache needs an explicit mask.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if not is_causal or (mask is None and tokens == keys):
        return mask, is_causal
    if tokens == 1:  # the last token attends to all
        return mask, False
    past = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if mask is None:
        return past, False
    return (mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)), False


@contextmanager
def recorded_router_stats(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect router_stats (2, E) of the routed layers of a model whose blocks discard them.

        with recorded_router_stats(model) as stats:
            loss = model(inputs).loss
        loss = loss + 0.01 * load_balance_loss(stats, [2] * len(stats))

    The list grows by one entry each time a routed layer runs inside the ``with`` block.

    Raises:
        UserError: if a layer runs under re-entrant activation checkpointing, which would cut the
            gradient of the statistics.
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
                hooks.enter_context(module.register_forward_hook(record))
        yield stats
