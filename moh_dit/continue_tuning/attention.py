"""The attention of a dense transformer, this project's or another's, as a MoH layer.

    dense = attention_from_linears(q_proj, k_proj, v_proj, o_proj, num_heads=8)
    layer = attention_to_moh(dense, num_shared_heads=4, num_active_routed_heads=2)

Heads change places within a layer, the shared ones first; nothing is drawn at random. Which heads
those should be, ``head_importance`` measures; ``fit_routers`` starts routers with weights of their
own. ``examples/`` puts such layers into a LLaMA decoder and a ViT.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..model.attention import MoHAttention, split_heads
from ..model.routing import query_norm_logits

# A learned router starts at this fraction of the query-norm logits, whose spread is 1: it selects
# the same heads, while gates stay near the 1 that the dense model had (docs/continue_tuning.md).
LEARNED_START = 0.1


@torch.no_grad()
def attention_to_moh(
    attention: MoHAttention,
    num_shared_heads: int | None,
    num_active_routed_heads: int | None,
    router: str = "query_norm",
    order: Tensor | None = None,
) -> MoHAttention:
    """A MoH layer with the weights of a dense one; a learned router starts with every gate 1.

    Args:
        attention: a layer without a router, left as it is.
        num_shared_heads, num_active_routed_heads, router: see :class:`MoHAttention`.
        order: the heads (h,) in their new order, those to be shared first; as they are if ``None``.

    Raises:
        UserError: when the layer has a router, or the head plan does not add up.
    """
    if attention.num_shared_heads is not None:
        raise UserError("the attention is MoH already; continue-tuning starts from a dense one")
    heads, width, kv = attention.num_heads, attention.head_dim, attention.num_key_value_heads
    qkv, proj = attention.qkv, attention.proj
    with torch.device("meta"):
        moh = MoHAttention(
            qkv.in_features,
            heads,
            num_shared_heads,
            num_active_routed_heads,
            width,
            qkv.bias is not None,
            attention.attention_backend,
            router,
            kv,
            proj.bias is not None,
        )
    moh.to_empty(device=qkv.weight.device).to(qkv.weight.dtype)
    for weight in moh.router_weights():
        weight.zero_()
    order = torch.arange(heads) if order is None else order
    order = order.to(qkv.weight.device)
    if kv < heads:  # queries alone are reordered; which keys they ask goes with them
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
    """A dense :class:`MoHAttention` with the weights of another library's four projections.

    Args:
        query, key, value: C → heads · d, C → key-value heads · d (twice); heads in this order.
        output: heads · d → C.

    Raises:
        UserError: when the sizes do not add up, or some but not all of q, k, v have a bias.
    """
    projections = (query, key, value)
    biases: list[Tensor] = [linear.bias for linear in projections if linear.bias is not None]
    if len(biases) not in (0, 3):
        raise UserError("either all of query, key and value have a bias, or none")
    width, kv = query.out_features // num_heads, num_key_value_heads or num_heads
    sizes = [linear.out_features for linear in projections] + [output.in_features]
    if sizes != [num_heads * width, kv * width, kv * width, num_heads * width]:
        raise UserError(
            f"query, key, value and output have {', '.join(map(str, sizes))} columns, which is not "
            f"{num_heads} heads with {kv} key-value heads"
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
    """Mean over tokens of ‖o_i W_proj,i‖₂, what head i adds to the residual stream; (h,) a layer.

    Norm-based analysis (arXiv 2004.10102, §3). In DiT a block scales all heads of a token by the
    same vector afterwards, which is left out.

    Args:
        layers: dense layers.
        run: runs the model they belong to over the data.
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

            hook = layer.proj.register_forward_pre_hook(partial(add, i, weight))
            hooks.callback(hook.remove)
        run()
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def fit_routers(
    dense: Sequence[MoHAttention], layers: Sequence[MoHAttention], run: Callable[[], None]
) -> None:
    """Start learned routers from the query-norm router, by least squares on what layers are given.

    ``W_routed`` becomes the linear map of the input x that comes nearest to the query-norm logits
    (less their mean over heads, which a softmax ignores), times ``LEARNED_START``. Where k = E it
    stays zero: every gate is 1 and the layer is the dense one.

    Args:
        dense: the layers as they are in the model that ``run`` runs.
        layers: the layers made from them by :func:`attention_to_moh`, fitted in place.
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
                gram, product = x.T @ x, x.T @ logits
                if i in moments:
                    gram, product = gram + moments[i][0], product + moments[i][1]
                moments[i] = gram, product

            hook = source.register_forward_pre_hook(partial(add, i, layer))
            hooks.callback(hook.remove)
        run()
    for i, (gram, product) in moments.items():
        ridge = 1e-6 * gram.diagonal().mean()
        solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), product)
        layers[i].wg.weight.copy_(LEARNED_START * solution.T)
