"""Time MoH attention without its projections, and compare it with dense attention.

    python benchmarks/attention.py [--plans 24:14+2 ...] [--json attention.json]

Prints milliseconds in bf16 (medians of CUDA-graph replays, in turns), from q, k, v and router
logits to the gated output. "dense" is multi-head attention with as many heads and no gate, by
torch's fastest backend. "then mask" is the published way to compute MoH: dense attention, eager
routing, multiplication by the gates. "compiled mask" is the same through torch.compile. "f+b" means
forward and backward pass.
"""

import argparse

import torch
import torch.nn.functional as F
from common import (
    Captured,
    environment,
    fastest_dense,
    make_projected,
    table,
    time_replays,
    write_json,
)

from moh_dit.model.attention import moh_attention, split_heads

SIZES = [(64, 256), (32, 1024), (8, 4096)]  # batch, tokens: 256, 512, 1024 px
PLANS = [(24, 14, 2), (16, 10, 2), (8, 8, 0), (24, 16, 3)]  # heads, shared, active: XL/2-75, -90


def measure(batch, tokens, heads, shared, active, width, seconds):
    torch._dynamo.reset()  # torch.compile stops after a few graphs per function
    plan = (heads, shared, active, width)
    projected = make_projected(batch, tokens, *plan, torch.bfloat16)
    upstream = torch.randn(batch, tokens, heads * width, device="cuda", dtype=torch.bfloat16)
    pull = torch.randn(2, heads - shared, device="cuda") if active else None
    q, k, v = (t.detach().requires_grad_() for t in split_heads(projected, heads, width))
    grad_dense = upstream.view(batch, tokens, heads, width).transpose(1, 2)
    leaf = projected.detach().clone().requires_grad_()

    def dense_forward():
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v)

    def dense_both():
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), grad_dense)

    def moh_forward(backend):
        with torch.no_grad():
            return moh_attention(projected, *plan, backend)

    def moh_both(backend, attention=moh_attention):
        outputs = [t for t in attention(leaf, *plan, backend) if t is not None]
        return torch.autograd.grad(outputs, leaf, [upstream, pull][: len(outputs)])

    compiled = torch.compile(moh_attention, dynamic=False)

    def compiled_forward():
        with torch.no_grad():
            return compiled(projected, *plan, "reference")

    row = dict(d=width, N=tokens, B=batch, plan=f"{heads}:{shared}+{active}")
    with fastest_dense():
        forward = {
            "dense": dense_forward,
            "then mask": lambda: moh_forward("reference"),
            "compiled mask": compiled_forward,
            "triton": lambda: moh_forward("triton"),
        }
        both = {
            "dense f+b": dense_both,
            "then mask f+b": lambda: moh_both("reference"),
            "compiled mask f+b": lambda: moh_both("reference", compiled),
            "triton f+b": lambda: moh_both("triton"),
        }
        for calls in (forward, both):
            times = time_replays([Captured(call) for call in calls.values()], 3, seconds)
            row.update(zip(calls, times, strict=True))
    row["forward ratio"] = row["triton"] / row["dense"]
    row["f+b ratio"] = row["triton f+b"] / row["dense f+b"]
    return row


def plan(text):
    """Parse "24:14+2" into (24, 14, 2)."""
    heads, _, others = text.partition(":")
    return (int(heads), *map(int, others.split("+")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plans", nargs="+", type=plan, default=PLANS, help="heads:shared+active")
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="length of each of the three turns"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    rows = []
    for width in (72, 64):
        for batch, tokens in SIZES:
            new = [measure(batch, tokens, *plan, width, args.seconds) for plan in args.plans]
            table(new, list(new[0]))
            rows += new
            write_json(args.json, rows)


if __name__ == "__main__":
    main()
