"""Compare MoHAttention with results of the published code (float64); fused projections."""

import copy

import pytest
import torch
from helpers.reference_arrays import load_reference, relative_error

from moh_dit.common.errors import UserError
from moh_dit.model.attention import MoHAttention, load_balance_loss

CASES = ["routed_only", "shared_and_routed", "shared_only", "wide_pyramid"]


@pytest.mark.parametrize("case", CASES)
def test_forward_balance_and_gradients_match_published(case):
    arrays, plan = load_reference(f"attention_{case}")
    layer = MoHAttention(**plan).double()
    layer.load_state_dict({k[6:]: v for k, v in arrays.items() if k.startswith("param.")})
    x = arrays["x"].clone().requires_grad_()

    y, stats = layer(x)
    balance = y.new_zeros(())
    if stats is not None:
        balance = load_balance_loss([stats], [plan["num_active_routed_heads"]], published=True)
    loss = y.square().mean() + 0.01 * balance
    loss.backward()

    assert relative_error(y, arrays["y"]) < 1e-9
    assert abs(balance.item() - arrays["aux_loss"].item()) <= 1e-6
    assert relative_error(x.grad, arrays["grad.x"]) < 1e-9
    gradients = {k[5:] for k in arrays if k.startswith("grad.")} - {"x"}
    assert gradients == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, arrays[f"grad.{name}"]) < 1e-9, name


def test_one_shared_head_and_no_router_are_ordinary_cases():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    y, stats = MoHAttention(32, 4, num_shared_heads=1, num_active_routed_heads=2)(x)
    assert y.shape == x.shape
    assert stats is not None
    torch.testing.assert_close(stats.sum(1), torch.tensor([2.0, 1.0]))  # Σf = k, ΣP̄ = 1
    dense = MoHAttention(32, 4)
    assert dense(x)[1] is None
    assert not [name for name, _ in dense.named_parameters() if "wg" in name]


def test_mean_gate_of_each_group_is_one_before_the_two_stage_weights():
    layer = MoHAttention(32, 8, num_shared_heads=0, num_active_routed_heads=3)
    gates, _ = layer.route(torch.randn(4, 7, 32))
    torch.testing.assert_close(gates.sum(-1), torch.full((4, 7), 3.0))
    assert ((gates > 0).sum(-1) == 3).all()


def test_balance_loss_has_one_scale_whatever_k():
    even = [torch.stack([torch.full((e,), k / e), torch.full((e,), 1 / e)])
            for e, k in [(4, 1), (4, 3), (10, 2)]]  # fmt: skip
    assert load_balance_loss(even, [1, 3, 2]).item() == pytest.approx(1.0)
    assert load_balance_loss(even, [1, 3, 2], published=True).item() == pytest.approx(2.0)


def layer_and_input(shared=3, active=2):
    torch.manual_seed(0)
    layer = MoHAttention(32, 8, shared, active).eval()
    torch.nn.init.normal_(layer.qkv.bias)
    return layer, torch.randn(2, 9, 32)


def inference(layer, x):
    with torch.no_grad():
        return layer(x)[0]


@pytest.mark.parametrize(("shared", "active"), [(8, 0), (3, 2), (0, 3)])
def test_fused_projections_compute_the_same(shared, active):
    layer, x = layer_and_input(shared, active)
    expected, names = inference(layer, x), layer.state_dict().keys()
    layer.fuse_projections()
    assert torch.equal(inference(layer, x), expected)
    assert layer.state_dict().keys() == names
    layer.router_weights()[0].data.neg_()
    layer.qkv.bias.data.neg_()
    assert torch.equal(inference(layer, x), expected)  # the copy is used
    layer.fuse_projections()
    again = inference(layer, x)
    assert not torch.equal(again, expected)
    layer.unfuse_projections()
    assert torch.equal(inference(layer, x), again)


def test_fused_projections_without_bias_or_router():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    for layer in (
        MoHAttention(32, 4, 1, 2, qkv_bias=False),
        MoHAttention(32, 4, 1, 2, router="query_norm"),
        MoHAttention(32, 4),
    ):
        expected = inference(layer, x)
        layer.fuse_projections()
        assert torch.equal(inference(layer, x), expected)
        assert (layer.fused_weight is not None) == bool(layer.router_weights())
        assert layer.fused_bias is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, other: layer.load_state_dict(other.state_dict()),
        lambda layer, other: torch.nn.Sequential(layer).load_state_dict(
            torch.nn.Sequential(other).state_dict(), assign=True
        ),
        lambda layer, other: layer.train().qkv.weight.data.copy_(other.qkv.weight),
    ],
    ids=["load", "load by the model", "train"],
)
def test_fused_weights_are_discarded_when_weights_change(change):
    layer, x = layer_and_input()
    other = copy.deepcopy(layer)
    other.qkv.weight.data.neg_()
    layer.fuse_projections()
    assert torch.equal(inference(layer.eval(), x), inference(copy.deepcopy(layer), x))
    assert layer.fused_weight is not None
    change(layer, other)
    assert torch.equal(inference(layer.eval(), x), inference(other, x))


def test_gradients_do_not_use_fused_weights():
    outcomes = []
    for fused in (False, True):
        layer, x = layer_and_input()
        if fused:
            layer.fuse_projections()
            layer.fused_weight.zero_()  # would change the output if it were used
        output, stats = layer(x)
        (output.square().sum() + load_balance_loss([stats], [2])).backward()
        outcomes.append({name: p.grad for name, p in layer.named_parameters()} | {"": output})
    assert all(gradient.any() for gradient in outcomes[0].values())
    assert all(torch.equal(outcomes[1][name], value) for name, value in outcomes[0].items())


def test_fused_weights_change_their_dtype_with_the_layer():
    layer, x = layer_and_input()
    layer.fuse_projections()
    layer.to(torch.float64)
    fused = inference(layer, x.double())
    assert layer.fused_weight.dtype == layer.fused_bias.dtype == torch.float64
    layer.unfuse_projections()
    assert torch.equal(inference(layer, x.double()), fused)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(num_heads=6, num_shared_heads=5, num_active_routed_heads=2), "leave 1 to route over"),
        (dict(num_heads=6, num_shared_heads=7, num_active_routed_heads=0), "must lie in 0"),
        (dict(num_heads=6, num_shared_heads=3, num_active_routed_heads=0), "no token"),
        (dict(num_heads=6, num_active_routed_heads=2), "num_shared_heads is not set"),
        (dict(num_heads=5), "not divisible"),
    ],
)
def test_head_plans_that_do_not_add_up_are_refused(plan, message):
    with pytest.raises(UserError, match=message):
        MoHAttention(48, **plan)
