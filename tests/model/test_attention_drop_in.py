"""The layer in other transformers: masks, rotary embeddings, grouped keys, a key-value cache."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moh_dit.common.errors import UserError
from moh_dit.continue_tuning.attention import attention_from_linears, attention_to_moh, fit_routers
from moh_dit.model.attention import MoHAttention, load_balance_loss, recorded_router_stats

HEADS, WIDTH, DIM, TOKENS = 4, 6, 20, 9
PLANS = [
    dict(router="learned", num_shared_heads=1, num_active_routed_heads=2),
    dict(router="query_norm", num_shared_heads=1, num_active_routed_heads=1),
    dict(router="query_norm", num_shared_heads=0, num_active_routed_heads=2),
    dict(),
]


def make_layer(**options):
    torch.manual_seed(0)
    return MoHAttention(DIM, HEADS, head_dim=WIDTH, **options).double()


def tokens(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, TOKENS, DIM, generator=generator, dtype=torch.float64)


def rotate(positions):
    """Return a hook that rotates the pairs (2i, 2i + 1) by their positions."""
    angles = positions[:, None] / 10 ** torch.arange(WIDTH // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(x):
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)

    return lambda query, key: (turned(query), turned(key))


def by_hand(layer, x, allowed, rotary=None):
    """Compute the layer head by head; ``allowed`` (B, N, N) is true where attention is allowed."""
    kv = layer.num_key_value_heads
    rows = layer.qkv(x).split([HEADS * WIDTH, kv * WIDTH, kv * WIDTH], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in rows)
    gates, _ = layer.route(x)
    if rotary is not None:
        query, key = rotary(query, key)
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // kv)
        scores = query[:, head] @ key[:, group].mT / math.sqrt(WIDTH)
        output = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value[:, group]
        outputs.append(output if gates is None else output * gates[..., head, None])
    return layer.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("backend", ["reference", "gathered"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_masks_rotary_and_grouped_keys_match_attention_by_hand(plan, key_value_heads, backend):
    layer = make_layer(num_key_value_heads=key_value_heads, attention_backend=backend, **plan)
    x, rotary = tokens(), rotate(torch.arange(TOKENS))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, -1, -1)
    present = torch.arange(TOKENS) < torch.tensor([[TOKENS], [6]])  # the second sequence is padded
    padded = present[:, None].expand(-1, TOKENS, -1)
    numbers = torch.zeros(2, 1, 1, TOKENS).double().masked_fill(~present[:, None, None], -math.inf)
    for allowed, options in [
        (torch.ones_like(causal), {}),
        (torch.ones_like(causal), dict(rotary=rotary)),
        (causal, dict(is_causal=True, rotary=rotary)),
        (padded, dict(attention_mask=present[:, None, None])),
        (causal & padded, dict(attention_mask=present[:, None, None], is_causal=True)),
        (causal & padded, dict(attention_mask=numbers, is_causal=True)),
        (causal & padded, dict(attention_mask=(causal & padded)[:, None], rotary=rotary)),
    ]:
        actual, _ = layer(x, **options)
        expected = by_hand(layer, x, allowed, options.get("rotary"))
        torch.testing.assert_close(actual, expected, msg=lambda m, o=options: f"{o.keys()}: {m}")


def test_gradients_of_the_gathered_backend_are_those_of_the_reference():
    gradients = []
    for backend in ("reference", "gathered"):
        layer = make_layer(num_key_value_heads=2, attention_backend=backend, **PLANS[1])
        present = torch.arange(TOKENS) < torch.tensor([[TOKENS], [6]])
        layer(tokens(), present[:, None, None], is_causal=True)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_mask_that_allows_everything_changes_nothing():
    layer = make_layer(**PLANS[0])
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    for a, b in zip(layer(tokens()), layer(tokens(), everything), strict=True):
        torch.testing.assert_close(a, b)


class Cache:
    """Keys and values of all tokens so far."""

    def __init__(self):
        self.parts = []

    def __call__(self, key, value):
        self.parts.append((key, value))
        return tuple(torch.cat(part, dim=2) for part in zip(*self.parts, strict=True))


@pytest.mark.parametrize("chunks", [[1] * TOKENS, [4, 1, 3, 1]], ids=["one by one", "chunks"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_cache_does_not_change_the_output(plan, chunks):
    layer = make_layer(num_key_value_heads=2, **plan)
    x, cache, outputs, start = tokens(), Cache(), [], 0
    for part in x.split(chunks, dim=1):
        rotary = rotate(torch.arange(start, start := start + part.shape[1]))
        outputs.append(layer(part, is_causal=True, rotary=rotary, cache=cache)[0])
    whole, _ = layer(x, is_causal=True, rotary=rotate(torch.arange(TOKENS)))
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    assert cache.parts[0][0].shape[1] == 2  # grouped keys: the cache holds two heads


@pytest.mark.parametrize("plan", PLANS[:2])
def test_neither_output_nor_routing_sees_the_future(plan):
    layer, x = make_layer(**plan), tokens()
    changed = x.clone()
    changed[:, 5:] = torch.randn_like(x[:, 5:])
    (a, _), (b, _) = (layer(inputs, is_causal=True) for inputs in (x, changed))
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_auto_avoids_triton_and_explicit_triton_is_an_error(monkeypatch):
    layer = make_layer(**PLANS[1])
    expected, _ = layer(tokens())
    monkeypatch.setattr("moh_dit.model.attention.choose_backend", lambda *arguments: "triton")
    torch.testing.assert_close(layer(tokens())[0], expected)  # "auto" on a GPU
    layer.attention_backend = "triton"
    with pytest.raises(UserError, match=r"no kernels for masks, .* the query-norm router"):
        layer(tokens())


def linears(bias=True, heads=HEADS, kv=2):
    torch.manual_seed(0)
    sizes = [heads * WIDTH, kv * WIDTH, kv * WIDTH]
    return [*(nn.Linear(DIM, size, bias=bias) for size in sizes), nn.Linear(heads * WIDTH, DIM)]


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_heads_in_any_order_with_grouped_keys_compute_the_same(router):
    dense = attention_from_linears(*linears(), HEADS, 2).double()
    order = torch.tensor([2, 0, 3, 1])
    moh = attention_to_moh(dense, 1, 3, router, order)
    torch.testing.assert_close(moh(tokens(), is_causal=True)[0], dense(tokens(), is_causal=True)[0])
    assert moh.key_value_head.tolist() == [1, 0, 1, 0]
    again = make_layer(num_shared_heads=1, num_active_routed_heads=3, router=router,
                       num_key_value_heads=2)  # fmt: skip
    again.load_state_dict(moh.state_dict())  # key_value_head is part of the state
    torch.testing.assert_close(again(tokens())[0], moh(tokens())[0], rtol=0, atol=0)


def test_a_fitted_router_learns_from_the_loss():
    dense = attention_from_linears(*linears(), HEADS, 2).double()
    moh = attention_to_moh(dense, 1, 2, "learned")
    fit_routers([dense], [moh], lambda: dense(tokens(8)))
    before = moh.wg.weight.abs().max().item()
    assert before > 0
    moh(tokens(), is_causal=True)[0].square().sum().backward()
    for weight in moh.router_weights():
        assert weight.grad.abs().max() > 0 or len(weight) == 1  # one shared head: softmax of one


def causal_output(layer, x):
    return layer(x, is_causal=True)[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_statistics_are_recorded_where_blocks_drop_them(checkpointed):
    layers = nn.ModuleList([make_layer(**PLANS[0]), make_layer(), make_layer(**PLANS[1])])
    x = tokens().requires_grad_()

    def run(use_reentrant):
        y = x
        for layer in layers:
            block = partial(causal_output, layer)
            added = checkpoint(block, y, use_reentrant=use_reentrant) if checkpointed else block(y)
            y = y + added
        return y

    with recorded_router_stats(layers) as stats:
        output = run(use_reentrant=False)
    assert [s[0].sum().item() for s in stats] == [pytest.approx(2), pytest.approx(1)]
    loss = load_balance_loss(stats, [2, 1])
    (output.sum() + loss).backward()
    assert len(stats) == 2
    assert layers[0].wg.weight.grad.abs().max() > 0
    if checkpointed:
        with pytest.raises(UserError, match="use_reentrant=False"), recorded_router_stats(layers):
            run(use_reentrant=True)
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_layer(num_key_value_heads=3), "num_key_value_heads is 3; it must divide"),
        (lambda: make_layer(num_key_value_heads=0), "num_key_value_heads is 0"),
        (lambda: make_layer(router="norm"), "router is 'norm'; choose one of learned, query_norm"),
        (
            lambda: attention_from_linears(*linears(), HEADS),
            "not fit 4 heads with 4 key-value heads",
        ),
        (
            lambda: attention_from_linears(*linears()[:2], *linears(bias=False)[2:], HEADS, 2),
            "have a bias, or none",
        ),
        (lambda: attention_to_moh(make_layer(), 1, 4), "leave 3 to route over"),
        (lambda: attention_to_moh(make_layer(**PLANS[0]), 1, 2), "has a router already"),
    ],
)
def test_invalid_settings_are_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()
