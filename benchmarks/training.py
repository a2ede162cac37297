"""Time a whole training step: forward and backward pass, fused AdamW, EMA.

    python benchmarks/training.py [--models ...] [--sizes 256 512] [--json training.json]
    python benchmarks/training.py --batch 16 32 64 128 --ways python graph --plot training.png

Prints images/s, milliseconds (medians) and peak memory. A step is launched from Python, or as one
CUDA graph (``--ways``). Weights are float32 with bf16 autocast and
blocks compiled; all models use the fastest dense attention backend of torch. ``--loss_after N``
first trains N steps on synthetic images and prints the mean loss of the last quarter. Images, noise
and timesteps are the same for every model and precision.
"""

import argparse
import gc
import itertools
import statistics

import torch
import torch.nn.functional as F
from common import (
    draw_curves,
    environment,
    fastest_dense,
    kernel_times,
    table,
    time_steps,
    write_json,
)
from float8 import float8_linears
from peers import add_arguments, build, compiled, initialise

from moh_dit.common.compat import move_towards_
from moh_dit.common.cuda_graphs import capture_graph

BATCH = {256: 160, 512: 40}


def draw(generator, x, t, y, noise):
    """Fill the inputs with a new noisy batch (DDPM, linear β) of smooth synthetic images."""
    classes = torch.Generator("cuda").manual_seed(1)
    shapes = torch.randn(1000, 4, 4, 4, generator=classes, device="cuda")
    for drawn in (t, y):
        drawn.random_(1000, generator=generator)
    noise.normal_(generator=generator)
    own = torch.randn(len(x), 4, 4, 4, generator=generator, device="cuda")
    images = F.interpolate(shapes[y] + 0.3 * own, x.shape[2:], mode="bicubic")
    kept = (1 - torch.linspace(1e-4, 2e-2, 1000, device="cuda")).cumprod(0)[t, None, None, None]
    x.copy_(kept.sqrt() * images + (1 - kept).sqrt() * noise)


def measure(name, pixels, batch, way, args):
    torch.manual_seed(args.seed)
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = compiled(initialise(build(name, pixels // 8)).train(), args)
        x = torch.randn(batch, 4, pixels // 8, pixels // 8)
        t, y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))
        noise = torch.randn(batch, 4, pixels // 8, pixels // 8)
    generator = torch.Generator("cuda").manual_seed(args.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0, fused=True,
                                  capturable=way == "graph")  # fmt: skip
    detached = [p.detach() for p in weights]
    average, rate = [p.clone() for p in detached], torch.tensor(1e-4, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            output = model(x, timestep=t, class_labels=y)
        error = F.mse_loss(output.sample[:, :4].float(), noise)
        balance = getattr(output, "load_balance_loss", None)
        (error if balance is None else error + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        move_towards_(average, detached, rate)
        return error.detach()

    torch.cuda.reset_peak_memory_stats()
    # One stream for all steps and the capture: the accumulators of gradients remember theirs.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with fastest_dense(), float8_linears(args.float8), torch.cuda.stream(stream):
        losses = []
        for _ in range(args.loss_after):
            draw(generator, x, t, y, noise)
            losses.append(step().item())
        call = step
        if way == "graph":
            for _ in range(3):
                step()
            call = capture_graph(step)
        milliseconds = time_steps(call, args.seconds)
        if args.profile:
            kernel_times(call)
    row = dict(model=name, pixels=pixels, batch=batch, way=way, ms=milliseconds,
               images_per_s=1000 * batch / milliseconds,
               peak_GiB=torch.cuda.max_memory_allocated() / 2**30)  # fmt: skip
    if losses:
        row["loss"] = statistics.fmean(losses[-max(1, len(losses) // 4) :])
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, BATCH, seconds=3.0)
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: by size)")
    parser.add_argument(
        "--ways", nargs="+", choices=["python", "graph"], default=["python"], help="how to launch"
    )
    parser.add_argument("--plot", help="file for curves of images/s over the batch size")
    parser.add_argument("--loss_after", type=int, default=0, help="train N steps, print the loss")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images")
    args = parser.parse_args()
    print(environment())
    rows = []
    cases = [(pixels, batch) for pixels in args.sizes for batch in args.batch or [BATCH[pixels]]]
    for (pixels, batch), way, name in itertools.product(cases, args.ways, args.models):
        row = measure(name, pixels, batch, way, args)
        same = [r for r in rows if (r["pixels"], r["batch"], r["way"]) == (pixels, batch, way)]
        dense = same[0] if same else row
        row[f"over {args.models[0]}"] = row["images_per_s"] / dense["images_per_s"]
        row["memory over"] = row["peak_GiB"] / dense["peak_GiB"]
        rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
        table([row], list(row))
        write_json(args.json, rows)
    draw_curves(args.plot, rows, ["way", "pixels"])
    table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
