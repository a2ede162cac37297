"""Time the forward pass of whole models: MoH-DiT, dense DiT, MoH as published, diffusers' DiT.

    python benchmarks/model.py [--models ...] [--sizes 256 512 1024] [--json model.json]

Prints images/s and milliseconds (medians of CUDA-graph replays, in turns), as in sampling. "no
graph" are milliseconds of launches from Python, which may take longer than the pass itself. Weights
are bf16 and blocks compiled; all models use the fastest dense attention backend of torch.
"""

import argparse
import gc

import torch
from common import (
    Captured,
    environment,
    fastest_dense,
    kernel_times,
    table,
    time_replays,
    time_steps,
    write_json,
)
from float8 import float8_linears
from peers import add_arguments, build, compiled, initialise

from moh_dit import PRESETS

BATCH = {256: 64, 512: 32, 1024: 8}


def prepare(name, pixels, batch, args):
    """Return the forward pass as a CUDA graph, and the milliseconds of a pass without it."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = initialise(build(name, pixels // 8)).to(torch.bfloat16).eval()
        if name in PRESETS:  # as in sampling
            model.fuse_qkv_projections()
        model = compiled(model, args)
        x = torch.randn(batch, 4, pixels // 8, pixels // 8, dtype=torch.bfloat16)
        t, y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))

    def forward():
        return model(x, timestep=t, class_labels=y)

    with fastest_dense(), float8_linears(args.float8), torch.no_grad():
        from_python = time_steps(forward, 0.5)
        if args.profile:
            print(name)
            kernel_times(forward)
        return Captured(forward), from_python


def measure(pixels, batch, args):
    """Return one row per model."""
    passes, from_python = zip(*(prepare(n, pixels, batch, args) for n in args.models), strict=True)
    times = time_replays(passes, seconds=args.seconds)
    return [
        {"model": name, "pixels": pixels, "batch": batch, "ms": ms, "no graph, ms": python,
         "images_per_s": 1000 * batch / ms, f"over {args.models[0]}": times[0] / ms}
        for name, ms, python in zip(args.models, times, from_python, strict=True)
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, BATCH, seconds=1.0)
    args = parser.parse_args()
    print(environment())
    rows = []
    for pixels in args.sizes:
        new = measure(pixels, BATCH[pixels], args)
        gc.collect()
        torch.cuda.empty_cache()
        table(new, list(new[0]))
        rows += new
        write_json(args.json, rows)
    table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
