"""Whole-model forward pass, images/s: MoH-DiT against dense DiT and MoH as published.

    python benchmarks/model.py [--models ...] [--sizes 256 512 1024] [--json model.json]

bf16 weights, blocks compiled, dense attention by torch's fastest backend in every model alike;
medians of CUDA-graph replays, turn by turn, as `sample_dit.py --cuda_graphs true` has it, and
without ("no graph"): launching 28 layers from Python may take longer than the pass itself.
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
from peers import add_model_arguments, build, compiled, initialise

from moh_dit import PRESETS

MODELS = ["DiT-XL/2", "MoH-DiT-XL/2-75", "MoH-DiT-XL/2-90", "MoH-DiT-XL/2-75 then mask",
          "diffusers DiT-XL/2"]  # fmt: skip
BATCH = {256: 64, 512: 32, 1024: 8}


def prepare(name, pixels, batch, args):
    """The forward pass as a graph, and milliseconds without one."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = initialise(build(name, pixels // 8)).to(torch.bfloat16).eval()
        if name in PRESETS:  # as the sampler does
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
    """A row for every model."""
    passes, from_python = zip(*(prepare(n, pixels, batch, args) for n in args.models), strict=True)
    times = time_replays(passes, seconds=args.seconds)
    return [
        {"model": name, "pixels": pixels, "batch": batch, "ms": ms, "no graph, ms": python,
         "images_per_s": 1000 * batch / ms, f"over {args.models[0]}": times[0] / ms}
        for name, ms, python in zip(args.models, times, from_python, strict=True)
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(BATCH))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each model's four turns")
    add_model_arguments(parser)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--json")
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
