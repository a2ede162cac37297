"""Make a MoH layer from the attention of a dense transformer, of this project or another.

    dense = attention_from_linears(q_proj, k_proj, v_proj, o_proj, num_heads=8)
    layer = attention_to_moh(dense, num_shared_heads=4, num_active_routed_heads=2)

Heads are reordered within the layer, shared heads first; no weight is drawn at random.
``head_importance`` measures which heads to share, and ``fit_routers`` initializes learned routers.
``examples/`` uses such layers in a LLaMA decoder and in a ViT.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..model.attention import MoHAttention, split_heads
from ..model.routing import query_norm_logits

# A learned router starts at this fraction of the query-norm logits, whose standard deviation is 1.
# It then selects the same heads, and its gates stay near 1, the gate of the dense model.
LEARNED_START = 0.1


@torch.no_grad()
def attention_to_moh(
    attention: MoHAttention,
    num_shared_heads: int | None,
    num_active_routed_heads: int | None,
    router: str = "query_norm",
    order: Tensor | None = None,
) -> MoHAttention:
    """Return a MoH layer with the weights of a dense one.

    Args:
        attention: a layer without a router; it is not changed.
        num_shared_heads, num_active_routed_heads: see :class:`MoHAttention`.
        router: see :class:`MoHAttention`; a learned router starts with every gate at 1.
        order: the heads in their new order, int64 (h,), shared heads first; ``None`` keeps the
            order.

    Raises:
        UserError: the layer has a router already, or the numbers of heads do not add up.
    """
    if attention.num_shared_heads is not None:
        raise UserError("the attention layer has a router already; give a dense layer")
    heads, width, kv = attention.num_heads, attention.head_dim, attention.num_key_value_heads
    qkv, proj = attention.qkv, attention.proj
    plan = (num_shared_heads, num_active_routed_heads, width)
    with torch.device("meta"):
        moh = MoHAttention(
            qkv.in_features, heads, *plan, qkv.bias is not None, attention.attention_backend,
            router, kv, proj.bias is not None,
        )  # fmt: skip
    moh.to_empty(device=qkv.weight.device).to(qkv.weight.dtype)
    for weight in moh.router_weights():
        weight.zero_()
    order = torch.arange(heads) if order is None else order
    order = order.to(qkv.weight.device)
    if kv < heads:  # keys are shared by several queries, so only queries are reordered
        blocks = torch.cat([order, torch.arange(heads, heads + 2 * kv, device=order.device)])
        moh.key_value_head.copy_(attention.key_value_head[order])
    else:
        blocks = torch.cat([order, heads + order, 2 * heads + order])
    for name, tensor in qkv.named_parameters():
        rows = tensor.unflatten(0, (-1, width))[blocks].flatten(0, 1)
        moh.qkv.get_parameter(name).copy_(rows)
    columns = proj.weight.unflatten(1, (heads, width))[:, order].flatten(1)
    moh.proj.weight.copy_(columns)
    if proj.bias is not None:
        moh.proj.bias.copy_(proj.bias)
    return moh


@torch.no_grad()
def attention_from_linears(
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    output: nn.Linear,
    num_heads: int,
    num_key_value_heads: int | None = None,
) -> MoHAttention:
    """Return a dense :class:`MoHAttention` with the weights of another library's projections.

    Args:
        query: C → num_heads · d.
        key, value: C → num_key_value_heads · d.
        output: num_heads · d → C.
        num_heads: number of query heads.
        num_key_value_heads: number of key and value heads; ``None`` for ``num_heads``.

    Raises:
        UserError: the sizes do not add up, or only some of query, key and value have a bias.
    """
    projections = (query, key, value)
    biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
    if len(biases) not in (0, 3):
        raise UserError("query, key and value must all have a bias, or none of them")
    width, kv = query.out_features // num_heads, num_key_value_heads or num_heads
    sizes = [linear.out_features for linear in projections] + [output.in_features]
    if sizes != [num_heads * width, kv * width, kv * width, num_heads * width]:
        raise UserError(
            f"query, key, value and output have {', '.join(map(str, sizes))} columns, which does "
            f"not fit {num_heads} heads with {kv} key-value heads"
        )
    with torch.device("meta"):
        attention = MoHAttention(
            query.in_features,
            num_heads,
            head_dim=width,
            qkv_bias=bool(biases),
            num_key_value_heads=kv,
            proj_bias=output.bias is not None,
        )
    attention.to_empty(device=query.weight.device).to(query.weight.dtype)
    if kv < num_heads:
        attention.key_value_head.copy_(torch.arange(num_heads) // (num_heads // kv))
    attention.qkv.weight.copy_(torch.cat([linear.weight for linear in projections]))
    if biases:
        attention.qkv.bias.copy_(torch.cat(biases))
    attention.proj.load_state_dict(output.state_dict())
    return attention


@torch.no_grad()
def head_importance(layers: Sequence[MoHAttention], run: Callable[[], None]) -> list[Tensor]:
    """Measure the contribution of every head to the residual stream.

    The contribution of head i is the mean over tokens of ‖o_i W_proj,i‖₂ (arXiv 2004.10102, §3).
    The gate that a DiT block applies afterwards is left out: it is the same for all heads.

    Args:
        layers: dense layers.
        run: runs their model on the data.

    Returns:
        One tensor (h,) per layer, float64.
    """
    sums = [torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers]
    counts = [0] * len(layers)
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            weight = layer.proj.weight.double().unflatten(1, (layer.num_heads, layer.head_dim))

            def add(i: int, weight: Tensor, module: nn.Module, arguments: tuple) -> None:
                outputs = arguments[0].double().flatten(0, 1).unflatten(1, weight.shape[1:])
                parts = torch.einsum("nhd,chd->nhc", outputs, weight)  # o_i W_proj,i
                sums[i] += parts.norm(dim=-1).sum(0).cpu()
                counts[i] += len(parts)

            hooks.enter_context(layer.proj.register_forward_pre_hook(partial(add, i, weight)))
        run()
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def fit_routers(
    dense: Sequence[MoHAttention], layers: Sequence[MoHAttention], run: Callable[[], None]
) -> None:
    """Initialize learned routers to select nearly the same heads as the query-norm router.

    ``W_routed`` becomes the least-squares map from a layer's input to the query-norm logits, times
    ``LEARNED_START``. The mean of the logits over heads is subtracted, because a softmax ignores
    it. If every routed head is active (k = E), ``W_routed`` stays zero and every gate is 1.

    Args:
        dense: the dense layers, in their model.
        layers: the layers that :func:`attention_to_moh` made from them; their routers are changed.
        run: runs the model of the dense layers on the data.
    """
    moments: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks:
        for i, (source, layer) in enumerate(zip(dense, layers, strict=True)):
            shared, active = layer.num_shared_heads, layer.num_active_routed_heads
            if shared is None or active in (0, layer.num_heads - shared):
                continue

            def add(i: int, layer: MoHAttention, module: nn.Module, arguments: tuple) -> None:
                x = arguments[0]
                query = split_heads(
                    layer.qkv(x), layer.num_heads, layer.head_dim, layer.num_key_value_heads
                )[0]
                logits = query_norm_logits(query, layer.num_shared_heads or 0).double()
                logits = (logits - logits.mean(-1, keepdim=True)).flatten(0, 1)
                x = x.double().flatten(0, 1)
                gram, product = moments.get(i, (0, 0))
                moments[i] = gram + x.T @ x, product + x.T @ logits

            hooks.enter_context(source.register_forward_pre_hook(partial(add, i, layer)))
        run()
    for i, (gram, product) in moments.items():
        ridge = 1e-6 * gram.diagonal().mean()
        solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), product)
        layers[i].wg.weight.copy_(LEARNED_START * solution.T)
