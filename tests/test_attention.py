"""MoHAttention against arrays of the published implementation, float64."""

import pytest
import torch
from reference import load_reference, relative_error

from moh_dit.attention import MoHAttention, load_balance_loss
from moh_dit.errors import UserError

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
