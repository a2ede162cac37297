"""Compare the memory formula with the bytes that autograd keeps, tensor by tensor."""

import pytest
import torch

from moh_dit.analysis.memory_estimate import activation_bytes, state_bytes
from moh_dit.model.transformer import MoHDiTTransformer2DModel

BATCH = 3
PLANS = {
    "dense": {},
    "shared": dict(num_shared_heads=4),
    "routed": dict(num_shared_heads=0, num_active_routed_heads=2),
    "both": dict(num_shared_heads=[1, 2], num_active_routed_heads=[2, 1], head_dim=24),
}


def build(plan):
    torch.manual_seed(0)
    model = MoHDiTTransformer2DModel(
        sample_size=16, hidden_size=64, depth=2, num_heads=4, num_classes=5, **PLANS[plan]
    ).train()  # fmt: skip
    model.set_attention_backend("reference")
    return model


def kept_bytes(model, forward):
    """Sum the bytes of all storages, except parameters, that ``forward`` saves for backward.

    Checkpointed blocks save only their inputs here.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return sum(storage.nbytes() for storage in kept.values()), output


def inputs():
    return torch.randn(BATCH, 4, 16, 16), torch.tensor([1, 20, 300]), torch.tensor([0, 1, 5])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_activations_are_what_autograd_keeps(plan, autocast):
    model = build(plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured, _ = kept_bytes(model, lambda: model(*inputs()).sample)
    assert activation_bytes(model, BATCH, autocast=autocast) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("plan", ["dense", "both"])
def test_activations_of_compiled_blocks(plan, autocast):
    torch._dynamo.reset()
    model = build(plan)
    # The partitioner that Inductor uses, without compiling anything to C++.
    model.compile_repeated_blocks(backend="aot_eager_decomp_partition")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured, _ = kept_bytes(model, lambda: model(*inputs()).sample)
    estimate = activation_bytes(model, BATCH, autocast=autocast, compiled=True)
    assert estimate == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("plan", ["dense", "both"])
def test_activations_under_checkpointing(plan):
    model = build(plan)
    hidden = torch.randn(BATCH, 64, 64, requires_grad=True)
    condition = torch.randn(BATCH, 64, requires_grad=True)
    one_block = max(
        kept_bytes(model, lambda block=block: block(hidden, condition))[0] for block in model.blocks
    )
    model.enable_gradient_checkpointing()
    measured, _ = kept_bytes(model, lambda: model(*inputs()).sample)
    assert measured < one_block  # the hooks see only the inputs of the blocks
    estimate = activation_bytes(model, BATCH, checkpointing=True)
    assert estimate == pytest.approx(measured + one_block, rel=0.03)
    assert estimate < activation_bytes(model, BATCH)


def test_state_is_what_a_trained_model_holds():
    model = build("both")
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(*inputs()).sample.square().mean().backward()
    adamw.step()
    expected = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "AdamW": [t for s in adamw.state.values() for key, t in s.items() if key != "step"],
    }
    found = state_bytes(model, 2)
    for name, tensors in expected.items():
        assert found[name] == sum(tensor.nbytes for tensor in tensors), name
    assert found["averages"] == 2 * found["weights"]
