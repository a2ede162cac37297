"""A dense model converted to MoH: the same with every head active, trainable with fewer."""

import copy
import sys

import pytest
import torch

import train_dit
from moh_dit.autoencoder import load_autoencoder
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common.errors import UserError
from moh_dit.continue_tuning.attention import attention_to_moh, head_importance
from moh_dit.continue_tuning.model import MoHSettings, dense_to_moh, noisy_batches
from moh_dit.diffusion.process import make_scheduler
from moh_dit.model.attention import MoHAttention, load_balance_loss
from moh_dit.model.routing import query_norm_gates
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline

CONFIG = dict(sample_size=8, hidden_size=48, depth=3, num_heads=[4, 6, 4], head_dim=12,
              num_classes=10)  # fmt: skip
FULL = dict(num_shared_heads=[2, 0, None], num_active_routed_heads=[2, 6, None])
PART = dict(num_shared_heads=[2, 0, 1], num_active_routed_heads=[1, 3, 1])


def dense_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = MoHDiTTransformer2DModel(**CONFIG)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype)


def batches(count=2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 4, 8, 8, generator=draw).to(dtype),
            torch.randint(1000, (4,), generator=draw),
            torch.randint(11, (4,), generator=draw),
        )
        for _ in range(count)
    ]


def head_rows(attention):
    """Return the query rows of each head as a set, to compare heads regardless of their order."""
    query = attention.qkv.weight.unflatten(0, (3, attention.num_heads, attention.head_dim))[0]
    return {tuple(head.flatten()[:4].tolist()) for head in query}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("router", ["query_norm", "learned"])
@pytest.mark.parametrize("choice", ["first", "random", "importance"])
def test_with_every_head_active_it_is_the_dense_model(choice, router, dtype, tolerance):
    dense, data = dense_model(dtype), batches(dtype=dtype)
    settings = MoHSettings(**FULL, router=router, shared_heads=choice, seed=3)
    moh = dense_to_moh(copy.deepcopy(dense), settings, data)
    expected, actual = (model(*data[0]).sample for model in (dense, moh))
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance
    for sample in (expected, actual):
        sample.square().mean().backward()
    ours = dict(moh.named_parameters())
    for name, parameter in dense.named_parameters():
        if parameter.requires_grad and ".attn." not in name:  # heads are in another order
            difference = (ours[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert difference.item() < 10 * tolerance, name
    for old, new in zip(dense.blocks, moh.blocks, strict=True):
        assert head_rows(old.attn) == head_rows(new.attn)
        norms = [block.attn.qkv.weight.grad.norm() for block in (old, new)]
        torch.testing.assert_close(norms[0], norms[1], rtol=10 * tolerance, atol=0)


def test_query_norm_router_is_the_published_formula():
    query = torch.randn(2, 6, 5, 8, dtype=torch.float64, requires_grad=True)
    gates, stats = query_norm_gates(query, shared=2, active=2)
    norms = torch.stack([query[:, i].square().sum(-1).sqrt() for i in range(2, 6)], dim=-1)
    scores = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    best = scores.topk(2).indices
    chosen = torch.zeros_like(scores).scatter(-1, best, 1.0)
    assert torch.equal(gates, torch.cat([torch.ones(2, 5, 2), chosen.detach()], -1).double())
    torch.testing.assert_close(stats, torch.stack([chosen.mean((0, 1)), scores.mean((0, 1))]))
    # Straight-through: the gradient of a selected gate is that of its score.
    upstream = torch.randn_like(gates)
    (ours,) = torch.autograd.grad(gates, query, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(chosen * scores, query, upstream[..., 2:])
    torch.testing.assert_close(ours, expected)
    assert ours[:, 2:].abs().max() > 0


@pytest.mark.parametrize("shared", [0, 3])
def test_query_norm_gates_stay_finite_where_norms_are_equal_or_alone(shared):
    query = torch.ones(1, 4, 3, 8, requires_grad=True)
    with torch.no_grad():
        query[:, :, 0] = 0
    gates, stats = query_norm_gates(query, shared, active=1)
    (gates.sum() + stats.sum()).backward()
    assert gates[..., shared].eq(1).all()  # of equal scores, the first head is selected
    assert query.grad.isfinite().all()
    assert stats[1].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("backend", ["reference", "gathered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_norm_layer_is_masked_dense_attention(backend, dtype):
    torch.manual_seed(0)
    dense = MoHAttention(24, 4)
    layer = attention_to_moh(dense, 1, 2).to(dtype)
    layer.attention_backend = backend
    x = torch.randn(2, 7, 24).to(dtype)
    gates, _ = layer.route(x)
    heads = []
    dense.to(dtype).proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    dense(x)
    expected = dense.proj((heads[0].unflatten(-1, (4, 6)) * gates.to(dtype)[..., None]).flatten(2))
    actual, stats = layer(x)
    torch.testing.assert_close(actual, expected)
    assert gates.sum(-1).eq(3).all()
    assert stats[0].sum().item() == pytest.approx(2)


def test_converted_model_learns_balances_saves_and_compiles(tmp_path):
    model = dense_to_moh(dense_model(), MoHSettings(**PART)).train()
    assert not [name for name in model.state_dict() if ".wg" in name]
    (inputs,) = batches(1)
    target = torch.randn(4, 8, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        output = model(*inputs)
        loss = (output.sample - target).square().mean() + 0.01 * output.load_balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    active = [layer.num_active_routed_heads for layer in model.routed_layers.values()]
    assert active == [1, 3, 1]
    torch.testing.assert_close(
        output.load_balance_loss, load_balance_loss(output.router_stats, active)
    )
    for stats, k in zip(output.router_stats, active, strict=True):
        assert stats[0].sum().item() == pytest.approx(k)

    model.save_pretrained(tmp_path)
    again = MoHDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.router == "query_norm"
    expected = model.eval()(*inputs).sample
    torch.testing.assert_close(again(*inputs).sample, expected, rtol=0, atol=0)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs).sample, expected)


def test_straight_through_reaches_the_queries_of_selected_heads():
    """With fewer active heads, the gradient of W_q includes that of the scores."""
    torch.manual_seed(0)
    dense = MoHAttention(24, 4)
    full, part = attention_to_moh(dense, 1, 3), attention_to_moh(dense, 1, 1)
    x, upstream = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for layer in (dense, full, part):
        layer(x)[0].backward(upstream)
    torch.testing.assert_close(full.qkv.weight.grad, dense.qkv.weight.grad)
    gates, _ = part.route(x)
    query, key, value = part.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    heads = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    fixed = part.proj((heads * gates.detach()[..., None]).flatten(2))
    (without,) = torch.autograd.grad(fixed, part.qkv.weight, upstream)
    rows = (part.qkv.weight.grad - without).unflatten(0, (3, 4, 6)).abs().amax((2, 3))
    assert rows[0, 1:].min() > 0  # queries of routed heads
    assert rows[0, 0] < 1e-6
    assert rows[1:].max() < 1e-6


def test_importance_finds_the_heads_that_contribute_most():
    torch.manual_seed(0)
    layer, x = MoHAttention(24, 4), torch.randn(2, 9, 24)
    with torch.no_grad():
        layer.proj.weight.unflatten(1, (4, 6))[:, 2] *= 10
    (scores,) = head_importance([layer], lambda: layer(x))
    inner = []
    hook = layer.proj.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    layer(x)
    hook.remove()
    for head in range(4):
        only = torch.zeros_like(inner[0])
        only[..., 6 * head : 6 * head + 6] = inner[0][..., 6 * head : 6 * head + 6]
        written = (only @ layer.proj.weight.T).norm(dim=-1).mean()
        assert scores[head].item() == pytest.approx(written.item(), rel=1e-5)
    assert scores.argmax() == 2
    assert not layer.proj._forward_pre_hooks


def test_learned_router_starts_near_the_query_norm_router():
    dense, data = dense_model(), batches(8)
    reference = dense_to_moh(copy.deepcopy(dense), MoHSettings(**PART))
    learned = dense_to_moh(copy.deepcopy(dense), MoHSettings(**PART, router="learned"), data)
    x = []
    hook = dense.blocks[1].attn.register_forward_pre_hook(lambda module, args: x.append(args[0]))
    for inputs in batches(12)[8:]:  # batches that were not used for fitting
        dense(*inputs)
    hook.remove()
    (a, _), (b, _) = (model.blocks[1].attn.route(torch.cat(x)) for model in (reference, learned))
    agreement = ((a > 0) & (b > 0)).sum() / (a > 0).sum()
    assert agreement > 0.65  # 3 of 6 heads: one half by chance
    assert (b[b > 0] - 1).abs().max() < 0.3
    again = MoHDiTTransformer2DModel.from_config(learned.config)  # as EMA models are made
    again.load_state_dict(learned.state_dict())


@pytest.fixture(scope="module")
def pipeline():
    return MoHDiTPipeline(
        dense_model(), load_autoencoder("digits"), make_scheduler(), [str(i) for i in range(10)]
    )


def test_training_goes_on_from_a_converted_folder(pipeline, tmp_path, monkeypatch):
    data = noisy_batches(pipeline, "digits", num_images=40, batch_size=32)
    assert [len(labels) for *_, labels in data] == [32, 8]
    model = copy.deepcopy(pipeline.transformer)
    settings = MoHSettings(**PART, shared_heads="importance")
    dense_to_moh(model, settings, data).save_pretrained(tmp_path / "moh")
    arguments = ["train_dit.py", f"--init_from={tmp_path / 'moh'}", f"--run_dir={tmp_path}/run",
                 "--num_steps=1", "--batch_size=8", "--evaluation.num_inference_steps=2",
                 "--optimizer.learning_rate=1e-30"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    train_dit.main()
    trained = load_pipeline(tmp_path / "run")
    assert trained.transformer.config.router == "query_norm"
    assert trained.transformer.config.num_shared_heads == [2, 0, 1]
    for name, parameter in trained.transformer.state_dict().items():
        torch.testing.assert_close(parameter, model.state_dict()[name], rtol=0, atol=0)
    trained.set_progress_bar_config(disable=True)
    assert trained([3], num_inference_steps=2).images[0].size == (32, 32)


def test_settings_that_contradict_the_converted_folder_are_reported(tmp_path, monkeypatch, capsys):
    dense_to_moh(dense_model(), MoHSettings(**PART)).save_pretrained(tmp_path / "moh")
    arguments = [f"--init_from={tmp_path / 'moh'}", f"--run_dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["train_dit.py", *arguments, "--model.router=learned"])
    with pytest.raises(SystemExit):
        train_dit.main()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "missing: blocks.0.attn.wg.weight" in message
    assert "leave out the model settings" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_active_routed_heads=[3, 3, 1]), "layer 0: .* leave 2 to route over"),
        (dict(num_shared_heads=[2, 0]), "num_shared_heads lists 2 layers, depth is 3"),
        (dict(num_shared_heads=[2, 7, 1]), "layer 1: num_shared_heads is 7"),
        (dict(num_shared_heads=None), "not set for any layer"),
        (dict(num_shared_heads=[2, 0, None]), "layer 2: .* is 1 but num_shared_heads is not set"),
        (dict(shared_heads="importance"), "shared_heads 'importance' .* first or random"),
        (dict(router="learned"), "router 'learned' .* query_norm"),
        (dict(router="norm"), "router is 'norm'; choose one of query_norm, learned"),
        (dict(shared_heads="best"), "choose one of first, random, importance"),
    ],
)
def test_invalid_settings_are_refused_and_leave_the_model_unchanged(change, message):
    model = dense_model()
    before = dict(model.config)
    with pytest.raises(UserError, match=message):
        dense_to_moh(model, MoHSettings(**(PART | change)))
    assert dict(model.config) == before


def test_a_moh_model_is_refused():
    model = dense_to_moh(dense_model(), MoHSettings(**PART))
    with pytest.raises(UserError, match="has routers already"):
        dense_to_moh(model, MoHSettings(**PART))


def test_data_with_more_classes_than_the_model_is_refused(pipeline):
    config = dict(pipeline.transformer.config) | {"num_classes": 3}
    few = MoHDiTPipeline(
        MoHDiTTransformer2DModel.from_config(config), pipeline.vae, pipeline.scheduler
    )
    with pytest.raises(UserError, match="digits has 10 classes, but the model has only 3"):
        noisy_batches(few, "digits")
