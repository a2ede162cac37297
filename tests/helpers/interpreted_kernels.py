"""Run the Triton kernels in Triton's interpreter, on the CPU, and print results as JSON.

This is a separate program, because the interpreter must be chosen before Triton is imported.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from helpers.reference_arrays import relative_error

from moh_dit.diffusion.noise import philox_normal
from moh_dit.kernels import launch_table
from moh_dit.model.attention import MoHAttention, moh_attention
from moh_dit.model.modulation import adaln
from moh_dit.model.transformer import MoHDiTTransformer2DModel

PADDING = 2
TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")  # of operators
# name: (B, N, heads, shared, active, head width, dtype, copy engine[, mean of q and of -k])
CASES = {
    "width 72, ragged": (2, 36, 4, 2, 1, 72, torch.float32, False),
    "width 72, copy engine": (2, 36, 4, 2, 1, 72, torch.float32, True),
    "width 64, float16": (1, 32, 4, 2, 1, 64, torch.float16, True),
    "no shared head": (2, 40, 3, 0, 2, 16, torch.float32, False),
    "shared heads alone": (1, 33, 3, 3, 0, 24, torch.float32, False),
    "narrow heads": (2, 50, 6, 2, 3, 8, torch.float32, False),
    "saturated router": (1, 24, 6, 0, 3, 16, torch.float32, False),
    "one token": (1, 1, 3, 1, 1, 16, torch.float32, False),
    # All scores are far below 0, so an unmasked key beyond N, with score 0, would dominate.
    "scores far below zero": (2, 40, 3, 1, 1, 16, torch.float32, False, 5.0),
    "scores below zero, float16": (2, 40, 3, 1, 1, 16, torch.float16, True, 2.5),
}
# name: (B, N, C, dtype of the stream, dtype of branches and modulation)
ADALN_CASES = {
    "ragged": (2, 37, 72, torch.float32, torch.float32),
    "half precision beside the stream": (2, 33, 48, torch.float32, torch.float16),
    "half precision": (3, 5, 40, torch.float16, torch.float16),
    "one token": (2, 1, 24, torch.float32, torch.float32),
}


def make_input(batch, tokens, heads, shared, active, width, dtype, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    columns = 3 * heads * width
    projected = torch.randn(batch, tokens, columns + heads + 2 + PADDING, generator=generator)
    projected[..., -PADDING:] = float("nan")  # padding, which must not be read
    projected[..., : heads * width] += mean
    projected[..., heads * width : 2 * heads * width] -= mean
    if active:  # in image 0, every token selects the first routed head and none the second
        projected[0, :, columns + shared] = 20
        projected[0, :, columns + shared + 1] = -20
    return projected.to(dtype)


def outcome(projected, plan, backend, upstream, pull):
    projected = projected.clone().requires_grad_()
    output, stats = moh_attention(projected, *plan, backend)
    outputs = [output] if stats is None else [output, stats]
    upstream = [a.to(b.dtype) for a, b in zip((upstream, pull), outputs, strict=False)]
    (gradient,) = torch.autograd.grad(outputs, projected, upstream)
    return output.detach(), stats, gradient


def compare(batch, tokens, heads, shared, active, width, dtype, tma, mean=0.0):
    launch_table.PLAIN["TMA"] = tma
    plan = (heads, shared, active, width)
    projected = make_input(batch, tokens, *plan, dtype, mean)
    generator = torch.Generator().manual_seed(1)
    # A gradient whose address is not a multiple of 16 bytes, like a view into another tensor.
    upstream = torch.randn(batch * tokens * heads * width + 1, generator=generator).to(dtype)
    upstream = upstream[1:].view(batch, tokens, heads * width)
    pull = 10 * torch.randn(2, heads - shared, generator=generator)
    actual = outcome(projected, plan, "triton", upstream, pull)
    again = outcome(projected, plan, "triton", upstream, pull)
    expected = outcome(projected.double(), plan, "reference", upstream, pull)
    used = 3 * heads * width + heads + (2 if shared and active else 0)
    result = {
        "output": relative_error(actual[0], expected[0]),
        "unselected_are_zero": bool(((expected[0] == 0) <= (actual[0] == 0)).all()),
        "gradient": relative_error(actual[2][..., :used], expected[2][..., :used]),
        "router_gradient": relative_error(
            actual[2][..., 3 * heads * width : used], expected[2][..., 3 * heads * width : used]
        ),
        "padding_gradient": actual[2][..., used:].abs().max().item(),
        "repeats": all(
            torch.equal(a, b) for a, b in zip(actual, again, strict=True) if a is not None
        ),
    }
    if active:
        result["stats"] = relative_error(actual[1], expected[1])
    return result


def compiled():
    """Compare a layer compiled as one graph with the same layer in eager mode."""
    torch.manual_seed(0)
    layer = MoHAttention(48, 4, 2, 1, head_dim=16, attention_backend="triton")
    x = torch.randn(2, 20, 48)
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        output, stats = call(x)
        (output.square().sum() + stats.square().sum()).backward()
        results.append([output.detach(), *(p.grad for p in layer.parameters())])
    return max(relative_error(a, b) for a, b in zip(*results, strict=True))


def operator_checks():
    from moh_dit.kernels import attention_operators

    projected = make_input(1, 20, 4, 2, 1, 16, torch.float32).nan_to_num_().requires_grad_()
    outcomes = torch.library.opcheck(
        attention_operators.attention_op, (projected, 4, 2, 1, 16), test_utils=TESTS
    )
    return sorted(set(outcomes.values()))


def adaln_outcome(inputs, backend):
    """Return results and gradients of adaLN, used as in a block and the next layer."""
    x, branch, modulation, upstream = inputs
    leaves = [each.clone().requires_grad_() for each in (x, branch, modulation)]
    x, branch, modulation = leaves
    shift1, scale1, shift2, scale2, gate = modulation.unsqueeze(1).chunk(5, dim=-1)
    x, first = adaln(
        x.mT.contiguous().mT, shift1, scale1, backend=backend
    )  # strides of a patch embedding
    x, second = adaln(x, shift2, scale2, gate, branch * first, backend)
    _, third = adaln(x + second, shift1, scale2, backend=backend)
    results = (x, first, second, third)
    loss = sum((a * b.to(a.dtype)).sum() for a, b in zip(results, upstream, strict=True))
    return [*map(torch.Tensor.detach, results), *torch.autograd.grad(loss, leaves)]


def adaln_inputs(batch, tokens, width, dtype, modulation_dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = (3 + 2 * normal(batch, tokens, width)).to(dtype)  # a mean that is not near 0
    branch = normal(batch, tokens, width).to(modulation_dtype)
    modulation = normal(batch, 5 * width).to(modulation_dtype)
    return x, branch, modulation, [normal(batch, tokens, width).to(dtype) for _ in range(4)]


def compare_adaln(case):
    inputs = adaln_inputs(*case)
    actual, again = (adaln_outcome(inputs, "triton") for _ in range(2))
    expected = adaln_outcome(
        [each.double() for each in inputs[:3]] + [[u.double() for u in inputs[3]]], "reference"
    )
    return {
        "worst": max(relative_error(a, b) for a, b in zip(actual, expected, strict=True)),
        "dtypes": [str(a.dtype)[6:] for a in actual],
        "repeats": all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)),
    }


def compiled_adaln():
    """Compare adaLN compiled as one graph with adaLN in eager mode."""
    inputs = adaln_inputs(2, 20, 32, torch.float32, torch.float32)

    def run(x, branch, modulation):
        shift, scale, gate = modulation.unsqueeze(1).chunk(3, dim=-1)
        x, y = adaln(x, shift, scale, backend="triton")
        x, z = adaln(x, shift, scale, gate, branch * y, "triton")
        _, last = adaln(x, shift, scale, backend="triton")
        return x.square().sum() + z.square().sum() + last.pow(3).sum()

    gradients = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [each.clone().requires_grad_() for each in (*inputs[:2], inputs[2][:, :96])]
        gradients.append(torch.autograd.grad(call(*leaves), leaves))
    return max(relative_error(a, b) for a, b in zip(*gradients, strict=True))


def whole_model():
    """Compare gradients by the kernels, with and without checkpointing, with plain torch."""
    torch.manual_seed(0)
    model = MoHDiTTransformer2DModel(4, 2, 2, hidden_size=24, depth=2, num_heads=3,
                                     num_shared_heads=1, num_active_routed_heads=1)  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    latents, labels = torch.randn(2, 2, 4, 4), torch.tensor([3, 1000])
    gradients = {}
    for way in ("reference", "triton", "triton, checkpointed"):
        model.set_attention_backend(way.split(",")[0])
        model.set_modulation_backend(way.split(",")[0])
        if way.endswith("checkpointed"):
            model.enable_gradient_checkpointing()
        model.zero_grad()
        output = model(latents, torch.tensor([10, 900]), labels)
        (output.sample.square().sum() + output.load_balance_loss).backward()
        gradients[way] = [p.grad for p in model.parameters() if p.requires_grad]
    expected = gradients.pop("reference")
    return {
        way: max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))
        for way, actual in gradients.items()
    }


def adaln_operator_checks():
    from moh_dit.kernels import triton_adaln

    x, branch, modulation, _ = adaln_inputs(2, 5, 16, torch.float32, torch.float32)
    gate, shift, scale, *_ = modulation.unsqueeze(1).split(16, -1)
    outcomes: set[str] = set()
    for g, b in ((None, None), (gate, branch)):
        forward = x, g, b, shift, scale
        backward = x, branch, x, triton_adaln.adaln_op(*forward)[2], g, b, scale
        for operator, arguments in (
            (triton_adaln.adaln_op, forward),
            (triton_adaln.adaln_backward_op, backward),
        ):
            outcomes |= set(
                torch.library.opcheck(operator, arguments, test_utils=TESTS[:2]).values()
            )
    return sorted(outcomes)


def noise():
    """Return the largest difference between noise kernel and tensor operations, by seed."""
    from moh_dit.kernels.triton_noise import philox_normal_triton

    differences = {}
    for seed, first_draw, draws, count in ((0, 0, 1, 16), (2**63 + 5, 7, 3, 1030), (-1, 2, 2, 5)):
        indices = torch.tensor([0, 3, 2**40 + 1])
        arguments = seed, indices, first_draw, draws, count
        difference = philox_normal_triton(*arguments) - philox_normal(*arguments)
        differences[str(seed)] = difference.abs().max().item()
    return differences


if __name__ == "__main__":
    chosen = {name: compare(*case) for name, case in CASES.items()}
    json.dump(
        {
            "cases": chosen,
            "compiled": compiled(),
            "operator_checks": operator_checks(),
            "adaln": {name: compare_adaln(case) for name, case in ADALN_CASES.items()},
            "adaln_compiled": compiled_adaln(),
            "adaln_operator_checks": adaln_operator_checks(),
            "model": whole_model(),
            "noise": noise(),
        },
        sys.stdout,
    )
