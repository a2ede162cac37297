"""Compare the fast backends with the definition; Triton kernels run in the interpreter."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.interpreted_kernels import ADALN_CASES, CASES, make_input, outcome
from helpers.reference_arrays import relative_error

from moh_dit.common.errors import UserError
from moh_dit.kernels.backends import (
    auto_backend,
    auto_cpu_backend,
    auto_modulation_backend,
    choose_backend,
)
from moh_dit.kernels.linear_gelu import can_fuse_gelu, linear_gelu
from moh_dit.model.attention import MoHAttention, moh_attention
from moh_dit.model.blocks import Mlp
from moh_dit.model.modulation import adaln
from moh_dit.model.transformer import MoHDiTTransformer2DModel


@pytest.fixture(scope="module")
def interpreted():
    program = [sys.executable, "-m", "helpers.interpreted_kernels"]
    tests = Path(__file__).parents[1]
    run = subprocess.run(program, cwd=tests, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_match_float64(interpreted, case):
    result = interpreted["cases"][case]
    tolerance = 1e-3 if CASES[case][6] == torch.float16 else 2e-6
    tolerance *= 5 if case.startswith("scores") else 1  # larger scores have larger rounding errors
    assert result["output"] < tolerance
    assert result["unselected_are_zero"]
    assert result["gradient"] < tolerance
    assert result["router_gradient"] < tolerance
    assert result["padding_gradient"] == 0
    assert result.get("stats", 0) < 1e-6
    assert result["repeats"]


def test_operators_trace_into_one_graph(interpreted):
    assert interpreted["compiled"] < 1e-6
    assert interpreted["operator_checks"] == ["SUCCESS"]


@pytest.mark.parametrize("case", ADALN_CASES)
def test_adaln_kernels_match_float64(interpreted, case):
    result = interpreted["adaln"][case]
    stream, others = (str(dtype)[6:] for dtype in ADALN_CASES[case][3:])
    assert result["worst"] < (2e-6 if others == "float32" else 2e-3)
    # The stream, three modulated outputs, and the gradients.
    assert result["dtypes"] == [stream, others, others, others, stream, others, others]
    assert result["repeats"]


def test_adaln_traces_into_one_graph(interpreted):
    assert interpreted["adaln_compiled"] < 1e-6
    assert interpreted["adaln_operator_checks"] == ["SUCCESS"]


def test_a_whole_model_by_kernels_has_the_gradients_of_plain_torch(interpreted):
    assert interpreted["model"].keys() == {"triton", "triton, checkpointed"}
    assert max(interpreted["model"].values()) < 1e-5


def test_the_noise_kernel_makes_the_numbers_of_any_other_device(interpreted):
    """Values differ only in the last bits of float64, so they are equal in float32."""
    assert len(interpreted["noise"]) == 3
    assert max(interpreted["noise"].values()) < 1e-14


@pytest.mark.parametrize(
    "plan", [(6, 3, 2, 8), (4, 0, 2, 8), (3, 3, 0, 8)], ids=["both", "routed", "shared"]
)
def test_gathered_equals_reference(plan):
    heads, shared, active, width = plan
    projected = make_input(2, 40, heads, shared, active, width, torch.float64).nan_to_num_()
    upstream = torch.randn(2, 40, plan[0] * plan[3])
    pull = torch.randn(2, plan[0] - plan[1])
    actual = outcome(projected, plan, "gathered", upstream, pull)
    expected = outcome(projected, plan, "reference", upstream, pull)
    for a, b in zip(actual, expected, strict=True):
        if b is not None:
            assert relative_error(a, b) < 1e-12


def test_equal_scores_go_to_the_lowest_head():
    layer = MoHAttention(16, 4, num_shared_heads=0, num_active_routed_heads=2)
    gates, _ = layer.route(torch.zeros(1, 3, 16))
    assert gates[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 3


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (((9, 0), torch.bfloat16, 72), "triton"),
        (((9, 0), torch.float32, 72), "reference"),
        (((9, 0), torch.bfloat16, 40), "reference"),
        (((8, 0), torch.bfloat16, 72), "reference"),
        ((None, torch.bfloat16, 72), "reference"),
    ],
)
def test_auto_takes_what_was_measured_on_gpus(case, expected):
    assert auto_backend(*case) == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [((256, 24, 14, 2), "gathered"), ((64, 24, 14, 2), "reference"), ((256, 8, 8, 0), "reference")],
)
def test_auto_takes_what_was_measured_on_cpus(case, expected):
    assert auto_cpu_backend(*case) == expected


def test_auto_computes_nothing_of_nothing_and_traces_without_data():
    layer = MoHAttention(16, 4, 1, 1)
    assert layer(torch.zeros(0, 256, 16))[0].shape == (0, 256, 16)
    assert layer.to("meta")(torch.zeros(2, 256, 16, device="meta"))[0].shape == (2, 256, 16)


def test_auto_leaves_what_only_broadcasts_to_plain_torch(monkeypatch):
    x, part = torch.randn(1, 5, 8), torch.randn(3, 1, 8)
    monkeypatch.setattr("moh_dit.kernels.backends.auto_modulation_backend", lambda *_: "triton")
    stream, out = adaln(x, part, part, part, torch.randn(3, 5, 8))
    assert stream.shape == out.shape == (3, 5, 8)
    monkeypatch.setattr("moh_dit.kernels.backends._triton_interpreted", lambda: True)
    with pytest.raises(UserError, match=r"takes shift, scale and gate of shape \(B, 1, C\)"):
        adaln(x, part, part, backend="triton")
    with pytest.raises(UserError, match="gate and branch together"):
        adaln(x, part, part, part)


def test_auto_takes_adaln_kernels_where_they_were_measured():
    assert auto_modulation_backend((9, 0), torch.bfloat16) == "triton"
    assert auto_modulation_backend((9, 0), torch.float32) == "reference"
    assert auto_modulation_backend((8, 0), torch.bfloat16) == "reference"
    assert auto_modulation_backend(None, torch.bfloat16) == "reference"


def on_hopper(monkeypatch):
    monkeypatch.setattr("moh_dit.kernels.linear_gelu.compute_capability", lambda _: (9, 0))


@torch.no_grad()
def test_the_mlp_takes_its_gelu_along_and_computes_the_same(monkeypatch):
    mlp, x = Mlp(32, 64).bfloat16().eval(), torch.randn(2, 5, 32, dtype=torch.bfloat16)
    expected = mlp(x)
    on_hopper(monkeypatch)
    graphs = []
    compiled = torch.compile(mlp, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
    assert torch.equal(mlp(x), expected)
    assert torch.equal(compiled(x), expected)
    assert "moh_dit.linear_gelu" in graphs[0].code
    mlp.backend = "reference"
    assert torch.equal(compiled(x), expected)
    assert "linear_gelu" not in graphs[1].code
    given = (x, mlp.fc1.weight.detach(), mlp.fc1.bias.detach())
    assert set(torch.library.opcheck(linear_gelu, given).values()) == {"SUCCESS"}


@torch.no_grad()
def test_a_layer_that_is_more_than_its_weights_is_called(monkeypatch):
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    layer = torch.nn.Linear(32, 64, dtype=torch.bfloat16).eval()
    assert not can_fuse_gelu(x, layer)  # on a CPU
    on_hopper(monkeypatch)
    assert can_fuse_gelu(x, layer)
    with torch.enable_grad():
        assert not can_fuse_gelu(x, layer)
    assert not can_fuse_gelu(x, layer.train())
    assert not can_fuse_gelu(x.float(), layer.eval())
    assert not can_fuse_gelu(x.float(), copy.deepcopy(layer).float())
    assert not can_fuse_gelu(x, copy.deepcopy(layer).float())  # as under autocast
    assert not can_fuse_gelu(x, copy.deepcopy(layer).to("meta"))  # offloaded
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert not can_fuse_gelu(x, layer)
        hook.remove()
    layer.forward = layer.forward
    assert not can_fuse_gelu(x, layer)
    del layer.forward
    assert can_fuse_gelu(x, layer)
    no_bias = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16).eval()
    assert not can_fuse_gelu(x, no_bias)
    adapted = type("Adapted", (torch.nn.Linear,), {})(32, 64, dtype=torch.bfloat16).eval()
    assert not can_fuse_gelu(x, adapted)
    layer.weight = type("Quantised", (torch.nn.Parameter,), {})(layer.weight)
    assert not can_fuse_gelu(x, layer)


@torch.no_grad()
def test_hooks_attached_after_compilation_are_heard(monkeypatch):
    on_hopper(monkeypatch)
    mlp, x = Mlp(32, 64).bfloat16().eval(), torch.randn(2, 5, 32, dtype=torch.bfloat16)
    compiled = torch.compile(mlp, backend="eager")
    before = compiled(x)

    class Negate(ModelHook):
        def post_forward(self, module, output):
            return -output

    add_hook_to_module(mlp.fc1, Negate())
    expected = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x), approximate="tanh"))
    assert torch.equal(compiled(x), expected)
    assert not torch.equal(expected, before)


def test_backends_that_cannot_run_are_refused():
    model = MoHDiTTransformer2DModel(4, 2, hidden_size=16, depth=1, num_heads=2)
    with pytest.raises(UserError, match="modulation_backend is 'fused'; choose one of auto"):
        model.set_modulation_backend("fused")
    with pytest.raises(UserError, match="mlp_backend is 'triton'; choose one of auto, reference"):
        model.set_mlp_backend("triton")
    model.set_modulation_backend("triton")
    with pytest.raises(UserError, match='modulation_backend "triton" needs a GPU'):
        model(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    projected = torch.zeros(1, 4, 3 * 16 + 16)
    with pytest.raises(UserError, match="choose one of auto"):
        moh_attention(projected, 2, 2, 0, 8, "flash")
    with pytest.raises(UserError, match="needs a GPU"):
        choose_backend("triton", projected, 2, 2, 0, 8)
    with pytest.raises(UserError, match=r"no kernels for torch\.float64"):
        choose_backend("triton", projected.double(), 2, 2, 0, 8)
    with pytest.raises(UserError, match="choose one of auto"):
        MoHAttention(16, 2, 2, 0, attention_backend="flash")
