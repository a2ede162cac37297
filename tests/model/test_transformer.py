"""Compare the whole model with results of the published code; check the presets."""

import logging
import math
from functools import partial

import pytest
import torch
from helpers.models import PUBLISHED, ROUTED, SMALL, randomized, reference_model
from helpers.reference_arrays import relative_error
from torch.utils.checkpoint import checkpoint

from moh_dit.common.errors import UserError
from moh_dit.model.presets import MOH_PLANS, PRESETS, build_model
from moh_dit.model.transformer import MoHDiTTransformer2DModel


@pytest.mark.parametrize("case", ["uniform_heads", "pyramid_heads"])
def test_output_matches_published(case):
    model, state, arrays = reference_model(case)
    with torch.no_grad():
        out = model(arrays["x"], arrays["t"], arrays["y"]).sample
    assert relative_error(out, arrays["out"]) < 1e-8
    assert arrays["y"][-1] == model.null_class
    saved = model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


@pytest.mark.parametrize("name", MOH_PLANS)
def test_published_sizes(name):
    with torch.device("meta"):
        model = build_model(f"MoH-DiT-{name}")
    parameters, active_heads = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    plans = [block.attn for block in model.blocks]
    assert sum(a.num_shared_heads + a.num_active_routed_heads for a in plans) == active_heads


def test_every_preset_builds_and_dense_ones_have_no_router():
    assert len(PRESETS) == 12 + 8
    for name in PRESETS:
        with torch.device("meta"):
            model = build_model(name, depth=PRESETS[name]["depth"])
        routers = [key for key in model.state_dict() if ".wg" in key]
        assert bool(routers) == name.startswith("MoH"), name
    with pytest.raises(UserError, match="MoH-DiT-XL/2-75"):
        build_model("MoH-DiT-XL/2-74")


def test_starts_as_zero_and_config_round_trips(tmp_path):
    model = MoHDiTTransformer2DModel(**ROUTED)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.tensor([0, 5])
    assert not model(x, t, y).sample.any()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model.save_pretrained(tmp_path)
    again = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.num_shared_heads == [2, 1, 0]
    torch.testing.assert_close(again(x, t, y).sample, model.eval()(x, t, y).sample, rtol=0, atol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_half_precision_is_kept_by_every_weight(low_cpu_mem_usage, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # caplog needs it
    model = MoHDiTTransformer2DModel(**ROUTED).to(torch.bfloat16)
    assert not caplog.records  # diffusers would warn about an empty list of float32 modules
    model.save_pretrained(tmp_path)
    options = dict(torch_dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage)
    again = MoHDiTTransformer2DModel.from_pretrained(tmp_path, **options)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def loss_and_gradients(model, config):
    torch.manual_seed(1)
    out = model(torch.randn(3, 4, 8, 8), torch.tensor([1, 50, 999]), torch.tensor([0, 3, 5]))
    loss = out.sample.square().mean() + out.load_balance_loss
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_balance_gradient_survives_activation_checkpointing(use_reentrant):
    loss, gradients = loss_and_gradients(randomized(ROUTED), ROUTED)
    model = randomized(ROUTED)
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
    assert model.gradient_checkpointing
    checkpointed_loss, checkpointed = loss_and_gradients(model, ROUTED)
    torch.testing.assert_close(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed, gradients)
    # The balance loss alone must reach every router, without the gradient of the sample.
    model.zero_grad()
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([5]), torch.tensor([0, 1]))
    out.load_balance_loss.backward()
    assert all(block.attn.wg.weight.grad.abs().max() > 0 for block in model.blocks)


def test_compiles_without_graph_break():
    model = randomized(ROUTED)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(randomized(ROUTED), ROUTED)
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, ROUTED)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradients, gradients)


@pytest.mark.parametrize("first", ["fused", "compiled"])
def test_projections_are_fused_before_or_after_compiling(first, tmp_path):
    torch._dynamo.reset()
    plan = dict(num_shared_heads=[4, None, 1], num_active_routed_heads=[0, 0, 2])
    model = randomized(SMALL | plan)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model.eval()(*inputs).sample
        if first == "fused":
            model.fuse_qkv_projections()
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(*inputs).sample, expected)
        model.fuse_qkv_projections()
        model.save_pretrained(tmp_path)
        again = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(*inputs).sample, expected)
        for layer in (0, 2):
            model.blocks[layer].attn.qkv.weight.zero_()
        torch.testing.assert_close(model(*inputs).sample, expected)  # the copy is used
        model.unfuse_qkv_projections()
        assert relative_error(model(*inputs).sample, expected) > 0.01


def test_attention_backends_are_chosen_by_name():
    model = randomized(ROUTED).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.tensor([0, 1])
    expected = model(x, t, y).sample
    model.set_attention_backend("gathered")
    assert {block.attn.attention_backend for block in model.blocks} == {"gathered"}
    torch.testing.assert_close(model(x, t, y).sample, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="auto, reference, gathered, triton"):
        model.set_attention_backend("flash")


def test_statistics_are_returned_in_training_only():
    model = randomized(ROUTED)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.tensor([0, 1])
    out = model(x, t, y)
    assert len(out.router_stats) == 3
    for stats, layer in zip(out.router_stats, model.routed_layers.values(), strict=True):
        assert stats[0].sum().item() == pytest.approx(layer.num_active_routed_heads)
    assert math.isfinite(out.load_balance_loss.item())
    assert model.eval()(x, t, y).load_balance_loss is None
    assert MoHDiTTransformer2DModel(**SMALL)(x, t, y).load_balance_loss is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_shared_heads=[2, 2]), "num_shared_heads lists 2 layers, depth is 3"),
        (dict(num_shared_heads=[2, 3, 2], num_active_routed_heads=2), "layer 1: .*leave 1"),
        (dict(patch_size=3), "not divisible by patch_size"),
    ],
)
def test_plans_that_do_not_add_up_name_the_layer(change, message):
    with pytest.raises(UserError, match=message):
        MoHDiTTransformer2DModel(**(SMALL | change))
