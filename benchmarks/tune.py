"""Time launch configurations of the attention kernels, and measure their error against float64.

    python benchmarks/tune.py [--kernels attend query_gradient key_value_gradient] [--json out.json]

Prints the fastest configurations for each kernel, head width and number of tokens, and those whose
results are wrong. Enter the best by hand in ``moh_dit/kernels/launch_table.py``.
"""

import argparse
import contextlib
import functools
import itertools
import math
from concurrent.futures import ProcessPoolExecutor

import torch
from common import environment, make_projected, relative_error, time_graph, write_json

from moh_dit.kernels import attention_operators as operators

CASES = {  # (batch, tokens, heads, shared, active)
    256: (64, 256, 24, 14, 2),
    1024: (32, 1024, 24, 14, 2),
    4096: (8, 4096, 24, 14, 2),
}


def configuration(bm, bm_routed, bn, warps, stages, tma, registers=None):
    config = dict(
        BM=bm, BM_ROUTED=bm_routed, BN=bn, num_warps=warps, num_stages=stages, TMA=tma
    )  # fmt: skip
    return config | (dict(maxnreg=registers) if registers else {})


SHAPES = {
    "attend": [
        (128, 64, 64, 4, 3), (128, 128, 64, 4, 3), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3),
        (64, 64, 32, 4, 3), (64, 64, 32, 4, 4), (128, 64, 32, 4, 3), (64, 64, 128, 4, 2),
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 128, 8, 2),
    ],
    "query_gradient": [
        (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3),
        (64, 64, 32, 4, 4), (128, 64, 64, 8, 3),
    ],
    "key_value_gradient": [
        (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 64, 128, 8, 3), (32, 32, 64, 4, 2),
        (32, 32, 64, 4, 3), (32, 32, 64, 4, 4), (64, 32, 64, 4, 3),
    ],
}  # fmt: skip
REGISTERS = {"attend": [], "query_gradient": [],
             "key_value_gradient": [(32, 32, 64, 4, 3), (32, 32, 64, 4, 2)]}  # fmt: skip


def candidates(kind, head_dim):
    found = [configuration(*shape, tma) for shape in SHAPES[kind] for tma in (False, True)]
    found += [configuration(*s, tma, 168) for s in REGISTERS[kind] for tma in (False, True)]
    return found


class Bench:
    """The inputs of one kernel at one size, to launch it in any configuration."""

    def __init__(self, kind, batch, tokens, heads, shared, active, head_dim, ragged=False):
        self.kind, self.sizes = kind, (shared, head_dim)
        plan = (heads, shared, active, head_dim)
        self.projected = make_projected(
            batch, tokens, *plan, torch.bfloat16, "extreme" if ragged else "random"
        )
        self.out = self.projected.new_empty(batch, tokens, heads * head_dim)
        self.gates, self.index, self.count, self.stats = operators.run_route(self.projected, *plan)
        if kind != "attend":
            safe = configuration(64, 64, 64, 4, 2, False)
            self.lse = self.attend(safe)
            self.grad_out = torch.randn_like(self.out)
            self.grad = torch.full_like(self.projected, float("nan"))
            self.delta = self.query_gradient(safe)

    def attend(self, config):
        return operators.run_attend(
            self.projected, self.gates, self.index, self.count, self.stats, self.out,
            self.stats.new_empty(self.stats.shape[1:]), *self.sizes, config,
        )  # fmt: skip

    def query_gradient(self, config):
        return operators.run_query_gradient(
            self.projected, self.grad_out, self.out, self.gates, self.lse, self.index, self.count,
            self.grad, *self.sizes, config,
        )  # fmt: skip

    def key_value_gradient(self, config):
        operators.run_key_value_gradient(
            self.projected, self.grad_out, self.lse, self.delta, self.index, self.count, self.grad,
            *self.sizes, config,
        )  # fmt: skip

    def __call__(self, config):
        getattr(self, self.kind)(config)

    def exact(self):
        """Compute the output, or the gradient of q, k and v, in float64 for the same gates."""
        heads, width = self.gates.shape[1], self.sizes[1]
        batch, tokens, _ = self.projected.shape
        qkv = self.projected[..., : 3 * heads * width].double().requires_grad_()
        q, k, v = qkv.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.transpose(-1, -2) / math.sqrt(width)).softmax(-1)
        out = (probabilities @ v) * self.gates.double().unsqueeze(-1)
        out = out.transpose(1, 2).flatten(2)
        if self.kind == "attend":
            return out.detach()
        return torch.autograd.grad(out, qkv, self.grad_out.double())[0]

    def error(self, config, exact):
        heads, width = self.gates.shape[1], self.sizes[1]
        hidden = heads * width
        if self.kind == "attend":
            self.out.fill_(float("nan"))
            self(config)
            return relative_error(self.out, exact)
        part = slice(0, hidden) if self.kind == "query_gradient" else slice(hidden, 3 * hidden)
        self.grad.fill_(float("nan"))
        self(config)
        return relative_error(self.grad[..., part], exact[..., part])


def warm(job):
    kind, head_dim, configs = job
    bench = Bench(kind, 1, 256, 24, 14, 2, head_dim)
    for config in configs:
        with contextlib.suppress(Exception):  # main() reports failures
            bench(config)
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[72, 64])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--top", type=int, default=8, help="number of configurations to print")
    parser.add_argument("--json")
    args = parser.parse_args()

    print(environment())
    jobs = []
    for kind, head_dim in itertools.product(args.kernels, args.head_dims):
        configs = candidates(kind, head_dim)
        pieces = max(1, args.workers // (len(args.kernels) * len(args.head_dims)) * 2)
        jobs += [(kind, head_dim, configs[i::pieces]) for i in range(pieces)]
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        list(pool.map(warm, jobs))

    rows = []
    for kind, head_dim in itertools.product(args.kernels, args.head_dims):
        check = Bench(kind, 2, 256, 24, 14, 2, head_dim, ragged=True)
        exact = check.exact()
        configs = candidates(kind, head_dim)
        errors = []
        for config in configs:
            try:
                errors.append(check.error(config, exact))
            except Exception as failure:
                errors.append(math.nan)
                print(kind, head_dim, config, repr(failure)[:120])
        del check, exact
        for tokens in args.tokens:
            bench = Bench(kind, *CASES[tokens], head_dim)
            times = []
            for config, error in zip(configs, errors, strict=True):
                try:
                    milliseconds = time_graph(functools.partial(bench, config))
                except Exception:
                    continue
                times.append((milliseconds, error, config))
                rows.append(
                    dict(kernel=kind, head_dim=head_dim, tokens=tokens, ms=milliseconds,
                         error=error, **config)
                )  # fmt: skip
            print(f"{kind} d={head_dim} N={tokens}: {len(times)} configurations")
            for milliseconds, error, config in sorted(times, key=lambda row: row[0])[: args.top]:
                print(f"  {milliseconds:7.4f} ms  error {error:.2e}  {tuple(config.values())}")
            wrong = [c for _, e, c in times if not e < 6e-3]
            print(f"  wrong: {len(wrong)}", [tuple(c.values()) for c in wrong][:6])
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
