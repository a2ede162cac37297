"""Hold the Triton kernels against float64 on this GPU, in every configuration ``auto`` can choose.

    python benchmarks/check_kernels.py [--json check.json]

Each row is one input; its error may be at most 1.5 times that of the dense reference at the same
precision (floor: rounding of the output format). Exit code 1 if any is not. Unwritten memory is
NaN throughout, and every result is computed twice and must repeat bit by bit. Where torch's own
dense attention gives what is not finite, its flash attention is the reference.
"""

import argparse
import itertools
import math
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from common import environment, make_projected, relative_error, table, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from moh_dit.diffusion.noise import philox_normal
from moh_dit.kernels.linear_gelu import linear_gelu
from moh_dit.model.attention import moh_attention
from moh_dit.model.modulation import adaln

PLANS = [(24, 14, 2), (16, 10, 2), (8, 8, 0), (6, 0, 3)]
TOKENS = [3, 200, 256, 576, 1000, 1024, 2100, 4096]
# For the first plan alone: whatever else the kernels are compiled for (no copy engine, as N is no
# multiple of 4; N a multiple of one block and not of the other).
MORE_TOKENS = [96, 544, 1001, 2049, 2112]
ROUTINGS = ["random", "skewed", "extreme", "cold"]


def outcome(projected, plan, backend, upstream, pull):
    """Output, gradient of q, gradient of k and v, gradient of the router logits, statistics."""
    heads, shared, active, width = plan
    projected = projected.detach().requires_grad_()
    output, stats = moh_attention(projected, *plan, backend)
    total = (output.double() * upstream.double()).sum()
    if stats is not None:
        total = total + (stats.double() * pull.double()).sum()
    (gradient,) = torch.autograd.grad(total, projected)
    hidden = heads * width
    used = 3 * hidden + heads + (2 if shared and active else 0)
    parts = gradient[..., :hidden], gradient[..., hidden : 3 * hidden]
    router = gradient[..., 3 * hidden : used]
    return [output.detach(), *parts, router] + ([stats.detach()] if active else [])


def dense_outcome(projected, plan, upstream, pull):
    """As :func:`outcome`, by dense attention of the same precision."""
    found = outcome(projected, plan, "reference", upstream, pull)
    if all(part.isfinite().all() for part in found):
        return found
    print(f"torch's dense attention is not finite: {projected.dtype}, {plan}, {projected.shape[1]}")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return outcome(projected, plan, "reference", upstream, pull)


NAMES = ["output", "dq", "dk, dv", "d logits", "stats"]


def keep_worst(row, ratio, name):
    """NaN is the worst, and stays."""
    if not (ratio <= row["worst"] or math.isnan(row["worst"])):
        row["worst"], row["where"] = ratio, name


def check(dtype, width, tokens, plan, routing):
    batch = 1 if tokens > 2000 else max(2, 256 // tokens)
    plan = (*plan, width)
    projected = make_projected(batch, tokens, *plan, dtype, routing)
    upstream = torch.randn(batch, tokens, plan[0] * width, device="cuda").to(dtype)
    pull = 10 * torch.randn(2, plan[0] - plan[1], device="cuda")
    exact = outcome(projected.double(), plan, "reference", upstream, pull)
    dense = dense_outcome(projected, plan, upstream, pull)
    chosen = outcome(projected, plan, "triton", upstream, pull)
    again = outcome(projected, plan, "triton", upstream, pull)
    floor = torch.finfo(dtype).eps / 8
    row = dict(dtype=str(dtype)[6:], d=width, N=tokens, plan="{}, {}+{}".format(*plan[:3]),
               routing=routing, worst=0.0, where="")  # fmt: skip
    for name, a, d, e in zip(NAMES, chosen, dense, exact, strict=False):
        allowed = max(relative_error(d, e), 1e-6 if name == "stats" else floor)
        row[name] = relative_error(a, e)
        keep_worst(row, row[name] / allowed, name)
    row["repeats"] = all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
    return row


def check_noise():
    """Whether the noise kernel makes the numbers of a CPU, which every image depends on."""
    worst, same = 0.0, 1.0
    for seed, first_draw, draws, count in ((0, 0, 1, 4096), (2**63 + 5, 7, 16, 4096), (3, 2, 2, 5)):
        indices = torch.tensor([0, 1, 49_999, 2**40 + 1])
        expected = philox_normal(seed, indices, first_draw, draws, count)
        found = philox_normal(seed, indices.cuda(), first_draw, draws, count).cpu()
        worst = max(worst, (found - expected).abs().max().item())
        same = min(same, (found.float() == expected.float()).float().mean().item())
    good = worst < 1e-12 and same > 0.9999
    print(f"noise: {worst:.1e} from a CPU's at most, {same:.4%} the same in float32")
    return good


def check_adaln():
    """adaLN of every preset's width against float64, beside the error of the plain tensors.

    As a block uses it, without a branch and with one.
    """
    fill_memory_with_nan()
    rows = []
    half, full = (torch.bfloat16, torch.float16), torch.float32
    kinds = [(stream, other) for other in half for stream in (full, other)]
    for width, (stream, other), tokens in itertools.product(
        (384, 768, 1024, 1152), kinds, (256, 77)
    ):
        torch.manual_seed(0)
        x = (3 + 2 * torch.randn(8, tokens, width, device="cuda")).to(stream)
        branch = torch.randn(8, tokens, width, device="cuda").to(other)
        modulation = torch.randn(8, 5 * width, device="cuda").to(other)
        kinds_of_result = (stream, other, other)
        upstream = [torch.randn(8, tokens, width, device="cuda").to(d) for d in kinds_of_result]
        given = [x, branch, modulation, *upstream]

        def outcome(backend, given):
            x, branch, modulation = leaves = [g.clone().requires_grad_() for g in given[:3]]
            shift1, scale1, gate, shift2, scale2 = modulation.unsqueeze(1).chunk(5, dim=-1)
            x, first = adaln(x, shift1, scale1, backend=backend)
            x, second = adaln(x, shift2, scale2, gate, branch, backend)
            results = [a.to(b.dtype) for a, b in zip((x, first, second), given[3:], strict=True)]
            gradients = torch.autograd.grad(results, leaves, given[3:])
            return [*(result.detach() for result in results), *gradients]

        exact = outcome("reference", [each.double() for each in given])
        dense, chosen, again = (outcome(b, given) for b in ("reference", "triton", "triton"))
        names = ("r", "first", "second", "dx", "d branch", "d modulation")
        row = dict(C=width, N=tokens, stream=str(stream)[6:], modulation=str(other)[6:],
                   worst=0.0, where="")  # fmt: skip
        for name, a, d, e in zip(names, chosen, dense, exact, strict=True):
            row[name] = relative_error(a, e)
            allowed = max(relative_error(d, e), torch.finfo(a.dtype).eps / 8)
            keep_worst(row, row[name] / allowed, name)
        row["repeats"] = all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
        rows.append(row)
    print("adaLN:")
    table(rows, list(rows[0]))
    return all(row["worst"] <= 1.5 and row["repeats"] for row in rows)


def check_linear_gelu():
    """The MLP's first layer with its GELU, of every preset's width, beside the plain two."""
    fill_memory_with_nan()
    rows = []
    for width, dtype, tokens in itertools.product(
        (384, 768, 1024, 1152), (torch.bfloat16, torch.float16), (8, 600, 16384)
    ):
        torch.manual_seed(0)
        x = torch.randn(2, tokens // 2, width, device="cuda").to(dtype)
        weight = torch.randn(4 * width, width, device="cuda").to(dtype) / 16
        bias = torch.randn(4 * width, device="cuda").to(dtype)

        def plain(x, weight, bias):
            return F.gelu(F.linear(x, weight, bias), approximate="tanh")

        exact = plain(x.double(), weight.double(), bias.double())
        found, again = (linear_gelu(x, weight, bias) for _ in range(2))
        error, allowed = relative_error(found, exact), relative_error(plain(x, weight, bias), exact)
        rows.append(dict(C=width, dtype=str(dtype)[6:], tokens=tokens, error=error,
                         worst=error / allowed, repeats=torch.equal(found, again)))  # fmt: skip
    print("linear layer with GELU:")
    table(rows, list(rows[0]))
    return all(row["worst"] <= 1.5 and row["repeats"] for row in rows)


def fill_memory_with_nan():
    """Fresh memory, that is."""
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_all(inputs):
    fill_memory_with_nan()
    torch.manual_seed(0)
    rows = [check(*one) for one in inputs]
    torch.cuda.empty_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=14, help="processes (they mostly compile)")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    good = [check_noise(), check_adaln(), check_linear_gelu()]
    short, long = [], []
    for dtype, width, (i, plan) in itertools.product(
        (torch.bfloat16, torch.float16), (64, 72), enumerate(PLANS)
    ):
        if dtype == torch.float16 and i != 0:
            continue  # the same kernels as for bfloat16; one plan tells whether the type is right
        routings = ROUTINGS if i == 0 else ROUTINGS[-1:]
        for tokens in TOKENS + (MORE_TOKENS if i == 0 else []):
            inputs = [(dtype, width, tokens, plan, routing) for routing in routings]
            (long if tokens > 1024 else short).append(inputs)
    rows, context = [], torch.multiprocessing.get_context("spawn")
    # Exact attention over 4096 tokens takes gigabytes: few of those at a time.
    for group, workers in ((short, args.workers), (long, min(7, args.workers))):
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            rows += itertools.chain.from_iterable(pool.map(check_all, group))
    wrong = [row for row in rows if not row["worst"] <= 1.5 or not row["repeats"]]
    worst = {}
    for row in rows:
        key = (row["dtype"], row["d"], row["N"])
        if key not in worst or not row["worst"] <= worst[key]["worst"]:
            worst[key] = row
    print("worst of each precision, width and N, as a ratio to the dense reference's error:")
    table(
        list(worst.values()), ["dtype", "d", "N", "plan", "routing", *NAMES[:4], "worst", "where"]
    )
    for row in wrong[:10]:
        print("WRONG", row)
    print(
        f"{len(rows)} inputs, {len(wrong)} wrong, worst ratio {max(r['worst'] for r in rows):.2f}"
    )
    write_json(args.json, rows)
    sys.exit(bool(wrong) or not all(good))


if __name__ == "__main__":
    main()
