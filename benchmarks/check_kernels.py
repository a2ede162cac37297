"""Compare the Triton kernels with float64 on this GPU, in every configuration ``auto`` can choose.

    python benchmarks/check_kernels.py [--parts presets shapes ...] [--json check.json]

The part "presets" runs every distinct head plan of the presets at batches of 1 to 512. The part
"shapes" runs a few plans at every kind of token count and routing. Each row of a table is one
input. An error is that of the worst image, or of the worst group of images with 256 tokens in all.
It may be at most 1.5 times the error of plain torch operations at the same precision, or the
rounding of the format if that is larger. Unwritten memory is filled with NaN. Every result is
computed twice, and both must have the same bits. Where torch's default dense attention returns
values that are not finite, its flash attention is the reference. Exit code 1 if any input fails.
"""

import argparse
import contextlib
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
from moh_dit.kernels.block_sizes import cdiv
from moh_dit.kernels.linear_gelu import linear_gelu
from moh_dit.model.attention import moh_attention
from moh_dit.model.modulation import adaln
from moh_dit.model.presets import PRESETS
from moh_dit.model.transformer import per_layer

PARTS = ("noise", "adaln", "gelu", "shapes", "presets")
LIMIT = 1.5  # largest ratio to the error of plain torch operations
PLANS = [(24, 14, 2), (16, 10, 2), (8, 8, 0), (6, 0, 3)]
TOKENS = [3, 200, 256, 576, 1000, 1024, 2100, 4096]
# For the first plan only: other cases that the kernels are compiled for. Without the copy engine,
# because N is not a multiple of 4; N a multiple of one block size but not of the other.
MORE_TOKENS = [96, 544, 1001, 2049, 2112]
ROUTINGS = ["random", "skewed", "extreme", "cold"]
# Batches at 256 tokens, for every plan of the presets.
BATCHES = {
    torch.bfloat16: [1, 2, 3, 8, 32, 64, 160, 256, 512],
    torch.float16: [3, 160],
    torch.float32: [3, 160],
}
LONGER = [(1024, 3), (4096, 1)]  # tokens, batch: likewise, bfloat16
CHUNK_TOKENS = 8192  # computed in float64 at once


def preset_plans():
    """Return every distinct (heads, shared, active, width) of the presets' layers with a router."""
    plans = set()
    for preset in PRESETS.values():
        depth = preset["depth"]
        columns = [
            per_layer(name, preset.get(name), depth)
            for name in ("num_heads", "num_shared_heads", "num_active_routed_heads")
        ]
        for heads, shared, active in zip(*columns, strict=True):
            if shared is not None:
                width = preset.get("head_dim") or preset["hidden_size"] // heads
                plans.add((heads, shared, active, width))
    return sorted(plans)


def outcome(projected, plan, backend, upstream, pull):
    """Return output, gradients of q, of k and v, of the router logits, and router statistics."""
    heads, shared, active, width = plan
    projected = projected.detach().requires_grad_()
    output, stats = moh_attention(projected, *plan, backend)
    outputs, upstreams = [output], [upstream.to(output.dtype)]
    if stats is not None:
        outputs, upstreams = [output, stats], [*upstreams, pull.to(stats.dtype)]
    (gradient,) = torch.autograd.grad(outputs, projected, upstreams)
    hidden = heads * width
    used = 3 * hidden + heads + (2 if shared and active else 0)
    parts = gradient[..., :hidden], gradient[..., hidden : 3 * hidden]
    router = gradient[..., 3 * hidden : used]
    return [output.detach(), *parts, router] + ([stats.detach()] if active else [])


def dense_outcome(projected, plan, upstream, pull):
    """Return :func:`outcome` of dense attention in the same precision."""
    plain = projected.dtype == torch.float32  # fused kernels may split float32 into TF32 parts
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        found = outcome(projected, plan, "reference", upstream, pull)
    if all(part.isfinite().all() for part in found):
        return found
    print(f"torch's dense attention is not finite: {projected.dtype}, {plan}, {projected.shape[1]}")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return outcome(projected, plan, "reference", upstream, pull)


NAMES = ["output", "dq", "dk, dv", "d logits", "stats"]


def keep_worst(row, ratio, name):
    """Store the ratio if it is the worst so far; NaN counts as the worst."""
    if not (ratio <= row["worst"] or math.isnan(row["worst"])):
        row["worst"], row["where"] = ratio, name


def worst_images(found, projected, plan, upstream, pull):
    """Return the errors of each outcome in ``found`` against float64: a list for each.

    The error of an output or gradient is the norm of the difference in the worst image, divided by
    the root mean square of the exact norms of all images. Float64 runs in chunks of images.
    """
    batch, tokens, _ = projected.shape
    step = max(1, CHUNK_TOKENS // tokens)
    errors, norms, stats = [[] for _ in found], [], []
    for images in torch.arange(batch).split(step):
        part = slice(int(images[0]), int(images[-1]) + 1)
        share = len(images) / batch  # statistics are means over the batch
        exact = outcome(projected[part].double(), plan, "reference", upstream[part], pull * share)
        stats += [share * each for each in exact[4:]]
        norms.append(torch.stack([e.flatten(1).norm(dim=1) for e in exact[:4]]))
        for own, result in zip(errors, found, strict=True):
            pairs = zip(result, exact[:4], strict=False)
            own.append(torch.stack([(a[part] - e).flatten(1).norm(dim=1) for a, e in pairs]))
    scale = torch.cat(norms, 1).square().mean(1).sqrt().clamp(min=1e-300)
    few = cdiv(256, tokens)  # the error of one image with few tokens is mostly chance
    worst = []
    for own in errors:
        groups = torch.cat(own, 1).split(few, dim=1)
        means = [group.square().mean(1).sqrt() for group in groups]
        worst.append((torch.stack(means, 1).amax(1) / scale).tolist())
    for own, result in zip(worst, found, strict=True):
        own += [relative_error(each, sum(stats)) for each in result[4:]]
    return worst


def check(dtype, batch, tokens, plan, routing):
    projected = make_projected(batch, tokens, *plan, dtype, routing)
    upstream = torch.randn(batch, tokens, plan[0] * plan[3], device="cuda").to(dtype)
    pull = 10 * torch.randn(2, plan[0] - plan[1], device="cuda")
    dense = dense_outcome(projected, plan, upstream, pull)
    chosen = outcome(projected, plan, "triton", upstream, pull)
    again = outcome(projected, plan, "triton", upstream, pull)
    same = all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
    del again
    errors, allowed = worst_images([chosen, dense], projected, plan, upstream, pull)
    floor = torch.finfo(dtype).eps / 8
    row = dict(dtype=str(dtype)[6:], d=plan[3], N=tokens, B=batch,
               plan="{}: {}+{}".format(*plan[:3]), routing=routing,
               worst=0.0, where="")  # fmt: skip
    for name, error, limit in zip(NAMES, errors, allowed, strict=False):
        row[name] = error
        keep_worst(row, error / max(limit, 1e-6 if name == "stats" else floor), name)
    row["repeats"] = same
    return row


def check_noise():
    """Return whether the noise kernel draws the same numbers as a CPU."""
    worst, same = 0.0, 1.0
    for seed, first_draw, draws, count in ((0, 0, 1, 4096), (2**63 + 5, 7, 16, 4096), (3, 2, 2, 5)):
        indices = torch.tensor([0, 1, 49_999, 2**40 + 1])
        expected = philox_normal(seed, indices, first_draw, draws, count)
        found = philox_normal(seed, indices.cuda(), first_draw, draws, count).cpu()
        worst = max(worst, (found - expected).abs().max().item())
        same = min(same, (found.float() == expected.float()).float().mean().item())
    good = worst < 1e-12 and same > 0.9999
    print(f"noise: differs from a CPU's by at most {worst:.1e}, {same:.4%} equal in float32")
    return good


def check_adaln():
    """Return whether adaLN agrees with float64, for the width of every preset.

    It is used as in a block: first without a branch, then with one.
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
    return all(row["worst"] <= LIMIT and row["repeats"] for row in rows)


def check_linear_gelu():
    """Return whether the fused linear layer and GELU agree with float64, for every width."""
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
    return all(row["worst"] <= LIMIT and row["repeats"] for row in rows)


def fill_memory_with_nan():
    """Let torch fill newly allocated memory with NaN."""
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_all(inputs):
    fill_memory_with_nan()
    torch.manual_seed(0)
    rows = [check(*one) for one in inputs]
    torch.cuda.empty_cache()
    return rows


def shape_groups():
    """Return lists of inputs: a few plans at every kind of token count and routing."""
    for dtype, width, (i, plan) in itertools.product(
        (torch.bfloat16, torch.float16), (64, 72), enumerate(PLANS)
    ):
        if dtype == torch.float16 and i != 0:
            continue  # the kernels are those of bfloat16, so one plan is enough to check the dtype
        routings = ROUTINGS if i == 0 else ROUTINGS[-1:]
        for tokens in TOKENS + (MORE_TOKENS if i == 0 else []):
            batch = 1 if tokens > 2000 else max(2, 256 // tokens)
            yield [(dtype, batch, tokens, (*plan, width), routing) for routing in routings]


def preset_groups():
    """Return lists of inputs: every plan of the presets at every batch."""
    for plan in preset_plans():
        routings = ["random", "skewed"] if plan[2] else ["random"]
        for dtype, batches in BATCHES.items():
            sizes = [(256, batch) for batch in batches]
            sizes += LONGER if dtype == torch.bfloat16 else []
            yield [(dtype, b, n, plan, routing) for n, b in sizes for routing in routings]


def is_large(dtype, batch, tokens, *_):
    """Return whether an input takes gigabytes of GPU memory."""
    return tokens * max(tokens, 32 * batch) > 2**20


def run_groups(groups, workers):
    """Check all groups in processes that share the GPU; few processes for large inputs."""
    groups = list(groups)
    rows, context = [], torch.multiprocessing.get_context("spawn")
    for large, count in ((False, workers), (True, min(4, workers))):
        chosen = [[one for one in group if is_large(*one) == large] for group in groups]
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            rows += itertools.chain.from_iterable(pool.map(check_all, filter(None, chosen)))
    return rows


def report(rows, keys):
    """Print the worst row per value of ``keys`` and up to 10 wrong rows; return if all pass."""
    wrong = [row for row in rows if not row["worst"] <= LIMIT or not row["repeats"]]
    worst = {}
    for row in rows:
        key = tuple(row[name] for name in keys)
        if key not in worst or not row["worst"] <= worst[key]["worst"]:
            worst[key] = row
    print(f"worst of each {', '.join(keys)}, as a ratio to the error of plain torch operations:")
    columns = ["dtype", "d", "N", "B", "plan", "routing", *NAMES[:4], "worst", "where"]
    table(list(worst.values()), columns)
    for row in wrong[:10]:
        print("WRONG", row)
    highest = max(row["worst"] for row in rows)
    print(f"{len(rows)} inputs, {len(wrong)} wrong, worst ratio {highest:.2f}")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, default=14, help="processes (they mostly compile)")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    checks = dict(noise=check_noise, adaln=check_adaln, gelu=check_linear_gelu)
    good = [check() for part, check in checks.items() if part in args.parts]
    rows = []
    if "shapes" in args.parts:
        rows += run_groups(shape_groups(), args.workers)
        good.append(report(rows, ["dtype", "d", "N"]))
    if "presets" in args.parts:
        of_presets = run_groups(preset_groups(), args.workers)
        good += [report(of_presets, keys) for keys in (["dtype", "d", "plan"], ["dtype", "N", "B"])]
        rows += of_presets
    write_json(args.json, rows)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
