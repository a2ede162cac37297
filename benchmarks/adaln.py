"""Time the adaLN of one block, by torch.compile and by the Triton kernels.

    python benchmarks/adaln.py [--tune] [--json adaln.json]

One block contains a modulated norm before attention, and a gated residual with a modulated norm
before the MLP. Prints milliseconds (medians of CUDA-graph replays) of the forward pass ("f") and of
both passes ("f+b"), and TB/s: the bytes that must be read and written, over the kernels' time.
``--tune`` instead prints the fastest launch configurations. Enter the best by hand in
``moh_dit/kernels/triton_adaln.py``.
"""

import argparse
import itertools

import torch
from common import environment, table, time_graph, write_json

from moh_dit.kernels import triton_adaln
from moh_dit.model.modulation import adaln

# Case: batch, tokens, width, dtype of the residual stream (float32 in training).
CASES = {
    "XL/2 training, 256 px": (160, 256, 1152, torch.float32),
    "XL/2 training, 512 px": (40, 1024, 1152, torch.float32),
    "L/2 training, 256 px": (160, 256, 1024, torch.float32),
    "B/2 training, 256 px": (160, 256, 768, torch.float32),
    "S/2 training, 256 px": (160, 256, 384, torch.float32),
    "XL/2 sampling, 256 px": (64, 256, 1152, torch.bfloat16),
    "XL/2 sampling, 1024 px": (8, 4096, 1152, torch.bfloat16),
}
USES = ("norm", "residual + norm")
BACKWARD_CONFIGS = list(itertools.product((8, 16, 32), (256, 512, 1024), (1, 2, 3, 4)))


def block(x, branch, modulation, backend):
    """Return the stream and the inputs of attention and MLP, in the dtype of a linear layer."""
    shift1, scale1, gate, shift2, scale2 = modulation.unsqueeze(1).chunk(5, dim=-1)
    x, first = adaln(x, shift1, scale1, backend=backend)
    x, second = adaln(x, shift2, scale2, gate, branch, backend)
    return x, first.to(branch.dtype), second.to(branch.dtype)


def inputs(batch, tokens, width, dtype):
    def normal(*shape, dtype):
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    x = normal(batch, tokens, width, dtype=dtype)
    branch = normal(batch, tokens, width, dtype=torch.bfloat16)
    return x, branch, normal(batch, 5 * width, dtype=torch.bfloat16)


def measure(name):
    torch._dynamo.reset()
    x, branch, _ = leaves = inputs(*CASES[name])
    upstream = [torch.randn_like(result) for result in block(*leaves, "reference")]
    row = dict(what=name)
    for backend, call in (("reference", torch.compile(block)), ("triton", block)):

        def forward(call=call, backend=backend):
            with torch.no_grad():
                return call(*leaves, backend)

        def both(call=call, backend=backend):
            return torch.autograd.grad(call(*leaves, backend), leaves, upstream)

        row[f"{backend} f"] = time_graph(forward)
        row[f"{backend} f+b"] = time_graph(both)
    # Forward: x, y; x, branch, x, y. Backward: the same again, and the gradients.
    bytes_forward = 3 * x.nbytes + 3 * branch.nbytes
    bytes_backward = 6 * x.nbytes + 4 * branch.nbytes
    row["TB/s f"] = bytes_forward / row["triton f"] / 1e9
    row["TB/s f+b"] = (bytes_forward + bytes_backward) / row["triton f+b"] / 1e9
    return row


def tune(name, use):
    """Time both kernels in every launch configuration, and print the fastest."""
    x, branch, modulation = (each.detach() for each in inputs(*CASES[name]))
    shift, scale, gate, *_ = modulation.unsqueeze(1).chunk(5, dim=-1)
    if use == "norm":
        gate = branch = None
    given = x, gate, branch, shift, scale
    _, out, statistics = triton_adaln.run_forward(*given)
    upstream = torch.randn_like(x), torch.randn_like(out)
    rows = []
    for columns in (128, 256, 512, 1024):
        ms = time_graph(lambda c=columns: triton_adaln.run_forward(*given, c))
        rows.append(dict(what=name, use=use, kernel="forward", config=(columns,), ms=ms))
    for config in BACKWARD_CONFIGS:
        ms = time_graph(
            lambda c=config: triton_adaln.run_backward(
                *upstream, x, statistics, gate, branch, scale, c
            )
        )
        rows.append(dict(what=name, use=use, kernel="backward", config=config, ms=ms))
    for kernel in ("forward", "backward"):
        best = sorted((r for r in rows if r["kernel"] == kernel), key=lambda row: row["ms"])[:7]
        print(f"{name}, {use}, {kernel}:", *(f"{r['config']} {r['ms']:.4f}" for r in best))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--tune", action="store_true", help="time launch configurations instead")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    rows = []
    for name in args.cases:
        rows += [r for use in USES for r in tune(name, use)] if args.tune else [measure(name)]
        write_json(args.json, rows)
    if not args.tune:
        table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
