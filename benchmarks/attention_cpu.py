"""Time attention on the CPU by the backends "gathered" (selected queries only) and "reference".

    python benchmarks/attention_cpu.py [--threads 2] [--json attention_cpu.json]

Prints milliseconds (medians of interleaved runs, float32, random routing) and their ratio.
"""

import argparse
import statistics
import time

import torch
from common import environment, table, write_json

from moh_dit.model.attention import moh_attention

PLANS = [(12, 3, 3), (12, 6, 3), (24, 8, 4), (24, 14, 4)]  # 50 % and 75 % of the heads active


def measure(tokens, plan, width, backward, repeats=15):
    heads, shared, active = plan
    projected = torch.randn(2, tokens, 3 * heads * width + heads + 2, requires_grad=backward)
    times = {"reference": [], "gathered": []}
    for repeat in range(repeats + 2):
        for backend, record in times.items():
            start = time.perf_counter()
            output, _ = moh_attention(projected, *plan, width, backend)
            if backward:
                torch.autograd.grad(output.sum(), projected)
            if repeat >= 2:
                record.append(1000 * (time.perf_counter() - start))
    share = f"{(shared + active) / heads:.0%}"
    case = "f+b" if backward else "forward"
    row = dict(N=tokens, d=width, plan=f"{heads}: {shared}+{active}", active=share, case=case)
    row |= {name + " ms": statistics.median(record) for name, record in times.items()}
    row["ratio"] = row["gathered ms"] / row["reference ms"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(environment(), torch.get_num_threads(), "threads")
    torch.manual_seed(0)
    rows = [
        measure(tokens, plan, 64, backward)
        for tokens in (256, 1024)
        for plan in PLANS
        for backward in (False, True)
    ]
    table(rows, list(rows[0]))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
