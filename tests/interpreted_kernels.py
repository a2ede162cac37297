"""Run the Triton kernels in Triton's interpreter, on the CPU, and print what came out as JSON.

A program of its own because the interpreter must be chosen before Triton is first imported.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from reference import relative_error

from moh_dit.attention import MoHAttention, moh_attention
from moh_dit.kernels import table
from moh_dit.noise import philox_normal

PADDING = 2
# name: (B, N, heads, shared, active, head width, dtype, copy engine)
CASES = {
    "width 72, ragged": (2, 36, 4, 2, 1, 72, torch.float32, False),
    "width 72, copy engine": (2, 36, 4, 2, 1, 72, torch.float32, True),
    "width 64, float16": (1, 32, 4, 2, 1, 64, torch.float16, True),
    "no shared head": (2, 40, 3, 0, 2, 16, torch.float32, False),
    "shared heads alone": (1, 33, 3, 3, 0, 24, torch.float32, False),
    "narrow heads": (2, 50, 6, 2, 3, 8, torch.float32, False),
    "saturated router": (1, 24, 6, 0, 3, 16, torch.float32, False),
    "one token": (1, 1, 3, 1, 1, 16, torch.float32, False),
}


def make_input(batch, tokens, heads, shared, active, width, dtype):
    generator = torch.Generator().manual_seed(0)
    columns = 3 * heads * width
    projected = torch.randn(batch, tokens, columns + heads + 2 + PADDING, generator=generator)
    projected[..., -PADDING:] = float("nan")  # padding that nobody may read
    if active:  # in image 0 everybody picks the first routed head, nobody the second
        projected[0, :, columns + shared] = 20
        projected[0, :, columns + shared + 1] = -20
    return projected.to(dtype)


def outcome(projected, plan, backend, upstream, pull):
    projected = projected.clone().requires_grad_()
    output, stats = moh_attention(projected, *plan, backend)
    loss = (output * upstream.to(output.dtype)).sum()
    if stats is not None:
        loss = loss + (stats * pull.to(stats.dtype)).sum()
    (gradient,) = torch.autograd.grad(loss, projected)
    return output.detach(), stats, gradient


def compare(batch, tokens, heads, shared, active, width, dtype, tma):
    table.PLAIN["TMA"] = tma
    plan = (heads, shared, active, width)
    projected = make_input(batch, tokens, *plan, dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
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
    """A layer through torch.compile, one graph, against itself without."""
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
    from moh_dit.kernels import ops

    projected = make_input(1, 20, 4, 2, 1, 16, torch.float32).nan_to_num_().requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    outcomes = torch.library.opcheck(ops.attention_op, (projected, 4, 2, 1, 16), test_utils=tests)
    return sorted(set(outcomes.values()))


def noise():
    """Largest difference of the noise kernel from the tensor operations, by case."""
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
            "noise": noise(),
        },
        sys.stdout,
    )
