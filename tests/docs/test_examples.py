"""MoH in transformers' own LLaMA and ViT, through the code in ``examples/``."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from moh_dit.model.attention import recorded_router_stats

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA = runpy.run_path(str(EXAMPLES / "llama_moh.py"))
VIT = runpy.run_path(str(EXAMPLES / "vit_moh.py"))
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def vit(dtype=torch.float32):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_labels=5, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config).to(dtype).eval()


def generate(model, prompt, mask=None, use_cache=True):
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_llama_at_full_activation_is_the_original(dtype, router):
    dense = llama(dtype)
    moh = LLAMA["to_moh"](dense, 4, 4, router)
    tokens = torch.randint(1, 64, (3, 20))
    padding = torch.arange(20) >= torch.tensor([[0], [5], [11]])  # on the left, as for generation
    for mask in (None, padding.long()):
        expected, actual = (m(tokens, attention_mask=mask).logits for m in (dense, moh))
        seen = padding if mask is not None else torch.ones_like(padding)
        assert relative_error(actual[seen], expected[seen]) < TOLERANCE[dtype]
        prompt = generate(dense, tokens, mask)
        assert torch.equal(generate(moh, tokens, mask), prompt)
        assert len(set(prompt[0, 20:].tolist())) > 2  # not one token over and over


def test_llama_at_full_activation_trains_like_the_original():
    dense = llama(torch.float64)
    moh = LLAMA["to_moh"](dense, 4, 4)
    tokens = torch.randint(1, 64, (3, 20))
    for model in (dense, moh):
        model(tokens, labels=tokens).loss.backward()
    ours = dict(moh.named_parameters())
    for name, parameter in dense.named_parameters():
        if "self_attn" not in name:
            assert relative_error(ours[name].grad, parameter.grad) < 1e-12, name
    old, new = dense.model.layers[1].self_attn, moh.model.layers[1].self_attn.moh
    rows = torch.cat([getattr(old, f"{x}_proj").weight.grad for x in "qkv"])
    assert relative_error(new.qkv.weight.grad, rows) < 1e-12
    assert relative_error(new.proj.weight.grad, old.o_proj.weight.grad) < 1e-12


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_llama_at_75_percent_learns_and_generates_with_a_cache(router):
    moh = LLAMA["to_moh"](llama(), 4, 2, router)
    tokens = torch.randint(1, 64, (4, 20))
    losses = LLAMA["tune"](moh, tokens, active=2, steps=15)
    assert losses[-1] < 0.7 * losses[0]
    with recorded_router_stats(moh.train()) as recorded:
        loss = moh(tokens, labels=tokens).loss
    assert len(recorded) == 3
    for stats in recorded:
        assert stats.shape == (2, 4)
        assert stats[0].sum().item() == pytest.approx(2, abs=1e-5)
    loss.backward()
    layer = moh.model.layers[1].self_attn.moh
    routing = layer.wg.weight if router == "learned" else layer.qkv.weight
    assert routing.grad.abs().max() > 0
    moh.eval()
    mask = (torch.arange(20) >= torch.tensor([[0], [5], [11], [2]])).long()
    for given in (None, mask):
        with_cache = generate(moh, tokens, given)
        assert torch.equal(with_cache, generate(moh, tokens, given, use_cache=False))


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_vit_at_full_activation_is_the_original(dtype, router):
    dense, images = vit(dtype), torch.randn(4, 3, 16, 16).to(dtype)
    moh = VIT["to_moh"](dense, images, 4, 4, router)
    assert relative_error(moh(images).logits, dense(images).logits) < TOLERANCE[dtype]


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_vit_at_75_percent_learns(router):
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
    moh = VIT["to_moh"](vit(), images, 4, 2, router)
    losses = VIT["tune"](moh, images, labels, active=2, steps=15)
    assert losses[-1] < 0.7 * losses[0]
    moh(images, labels=labels).loss.backward()
    layer = moh.vit.layers[1].attention.moh
    routing = layer.wg.weight if router == "learned" else layer.qkv.weight
    assert routing.grad.abs().max() > 0


def test_conversion_leaves_the_original_alone():
    dense, images = vit(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(dense.state_dict())
    VIT["to_moh"](dense, images, 4, 2)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("name", ["llama_moh", "vit_moh"])
def test_examples_run_as_they_are_and_are_short(name, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split()[2]) < 1e-6
    first, last = lines[1].partition("loss ")[2].split(" in ")[0].split(" → ")
    assert float(last) < float(first)
    if name == "llama_moh":
        assert lines[2].endswith("True")
