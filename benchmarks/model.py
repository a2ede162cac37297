"""Whole-model forward pass, images/s: MoH-DiT against dense DiT and MoH as published.

    python benchmarks/model.py [--models ...] [--sizes 256 512 1024] [--json model.json]

bf16 weights, blocks compiled, dense attention by torch's fastest backend in every model alike;
medians of CUDA-graph replays, as `sample_dit.py --cuda_graphs true` has it, and without ("no
graph"): launching 28 layers from Python may take longer than the pass itself.
"""

import argparse
import gc

import torch
from common import (
    environment,
    fastest_dense,
    kernel_times,
    table,
    time_graph,
    time_steps,
    write_json,
)
from float8 import float8_linears
from peers import add_model_arguments, build, compiled, initialise

from moh_dit import PRESETS

MODELS = ["DiT-XL/2", "MoH-DiT-XL/2-75", "MoH-DiT-XL/2-90", "MoH-DiT-XL/2-75 then mask",
          "diffusers DiT-XL/2"]  # fmt: skip
BATCH = {256: 64, 512: 32, 1024: 8}


def measure(name, pixels, batch, args):
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = initialise(build(name, pixels // 8)).to(torch.bfloat16).eval()
        if name in PRESETS:  # as the sampler does
            model.fuse_qkv_projections()
        model = compiled(model, args)
        x = torch.randn(batch, 4, pixels // 8, pixels // 8, dtype=torch.bfloat16)
        t, y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))
    with fastest_dense(), float8_linears(args.float8), torch.no_grad():
        milliseconds = time_graph(
            lambda: model(x, timestep=t, class_labels=y), repeats=args.repeats
        )
        from_python = time_steps(lambda: model(x, timestep=t, class_labels=y), 0.5)
        if args.profile:
            kernel_times(lambda: model(x, timestep=t, class_labels=y))
    return {
        "model": name, "pixels": pixels, "batch": batch, "ms": milliseconds,
        "no graph, ms": from_python, "images_per_s": 1000 * batch / milliseconds,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(BATCH))
    parser.add_argument("--repeats", type=int, default=40)
    add_model_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    rows = []
    for pixels in args.sizes:
        for name in args.models:
            row = measure(name, pixels, BATCH[pixels], args)
            dense = next((r for r in rows if r["pixels"] == pixels), row)
            row[f"over {args.models[0]}"] = row["images_per_s"] / dense["images_per_s"]
            rows.append(row)
            gc.collect()
            torch.cuda.empty_cache()
            table([row], list(row))
            write_json(args.json, rows)
    table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
