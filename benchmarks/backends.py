"""Train one model by every attention backend and precision, and compare the loss curves.

    python benchmarks/backends.py DATA [--models ...] [--precisions ...] [--json backends.json]

DATA is any image set that ``--data.source`` of a run accepts, such as a folder with one sub-folder
per class. A pixel unshuffle turns images of 64 px into "latents" of 12×32×32: 256 tokens, as at
256 px, without an autoencoder.

An arm is one model, precision and way to compute. All arms of a seed train on the same batches,
flips, times, noise and dropped labels. All arms of a model and seed start from the same weights, so
only rounding tells their curves apart. A perturbed copy of an arm multiplies every initial weight
by 1 + 1e-7·N(0, 1); the spread of the copies is the spread that rounding alone causes. A backend
with a wrong result would leave that spread. float32 is computed without TF32.

On a GPU, a whole training step is one CUDA graph, and arms are spread over all GPUs.
"""

import argparse
import contextlib
import gc
import itertools
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import torch.nn.functional as F
from common import environment, write_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from moh_dit import PRESETS
from moh_dit.data.images import load_batch, open_images
from moh_dit.data.pixels import to_float
from moh_dit.diffusion.objectives import NoiseObjective
from moh_dit.model.transformer import MoHDiTTransformer2DModel

DENSE, SPARSE = "DiT-S/2", "MoH-DiT-S/2-75"
MODELS = {
    **PRESETS,
    "small": dict(depth=6, hidden_size=192, num_heads=6, patch_size=4),
    "small MoH-75": dict(
        depth=6, hidden_size=192, num_heads=6, patch_size=4,
        num_shared_heads=[2, 3, 3, 3, 3, 6], num_active_routed_heads=[1, 1, 1, 2, 2, 0],
    ),
}  # fmt: skip
# Attention by (whether the model is MoH, precision). The first is that of the base arm.
BACKENDS = {
    (True, "bf16"): ["triton", "reference"],
    (True, "float32"): ["reference", "triton"],
    (False, "bf16"): ["cudnn", "flash"],
    (False, "float32"): ["efficient", "math"],
}
DENSE_BACKENDS = dict(
    cudnn=SDPBackend.CUDNN_ATTENTION, flash=SDPBackend.FLASH_ATTENTION,
    efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH,
)  # fmt: skip
VARIANTS = ("backends", "compiled", "adaln")
PERTURBATION = 1e-7
BALANCE_WEIGHT = 0.01


def is_moh(model):
    return "num_shared_heads" in MODELS[model]


def make_arms(models, precisions, seeds, variants, copies):
    """Return a base arm per model, precision and seed, and the variants of the first seed's."""
    arms = []
    for model, precision, seed in itertools.product(models, precisions, seeds):
        backends = BACKENDS[is_moh(model), precision]
        base = dict(model=model, precision=precision, attention=backends[0], compiled=False,
                    adaln="auto", perturbed=0, seed=seed)  # fmt: skip
        own = [base]
        if seed == seeds[0]:
            own += [base | dict(perturbed=copy) for copy in range(1, copies + 1)]
            if "backends" in variants:
                own += [base | dict(attention=backend) for backend in backends[1:]]
            if "compiled" in variants:
                own += [arm | dict(compiled=True) for arm in own if not arm["perturbed"]]
            if "adaln" in variants and precision == "bf16":  # float32 has no adaLN kernel in "auto"
                own.append(base | dict(adaln="reference"))
        arms += own
    return arms


def load_latents(source, image_size, count, device):
    """Return normalised latents (images, 12, size / 2, size / 2), labels and the class count."""
    images = open_images(source, image_size, progress=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels, labels = load_batch(images, order[:count].tolist())
    latents = F.pixel_unshuffle(to_float(pixels), 2)
    latents -= latents.mean((0, 2, 3), keepdim=True)
    latents /= latents.std((0, 2, 3), keepdim=True)
    return latents.to(device), torch.from_numpy(labels).to(device), len(images.class_names)


class Training:
    """One arm: a model, its optimizer, and the input tensors of a step."""

    def __init__(self, arm, args, latents, labels, num_classes):
        self.arm, self.args, self.latents, self.labels = arm, args, latents, labels
        self.null_class, device = num_classes, latents.device
        torch._dynamo.reset()
        torch.manual_seed(arm["seed"])
        config = MODELS[arm["model"]] | dict(
            sample_size=latents.shape[-1], in_channels=latents.shape[1], num_classes=num_classes
        )
        self.model = MoHDiTTransformer2DModel(**config).to(device).train()
        if is_moh(arm["model"]):
            self.model.set_attention_backend(arm["attention"])
        self.model.set_modulation_backend(arm["adaln"])
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        if arm["perturbed"]:
            torch.manual_seed(arm["perturbed"])
            with torch.no_grad():
                for weight in self.weights:
                    weight.mul_(1 + PERTURBATION * torch.randn_like(weight))
        if arm["compiled"]:
            self.model.compile_repeated_blocks()
        self.rate = torch.tensor(args.learning_rate, device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=0, fused=cuda, capturable=cuda
        )
        self.objective = NoiseObjective(device=device)
        self.generator = torch.Generator(device)
        x, of_image = latents[: args.batch], labels[: args.batch]
        self.inputs = [each.clone() for each in (x, of_image, of_image, x)]

    def draw(self, step):
        """Set the batch of a step, by (seed, step) alone."""
        self.generator.manual_seed(self.arm["seed"] * 1_000_000 + step)
        options = dict(generator=self.generator, device=self.latents.device)
        chosen = torch.randint(len(self.latents), (self.args.batch,), **options)
        flipped, dropped = torch.rand(2, self.args.batch, **options)
        x = self.latents[chosen]
        x = torch.where((flipped < 0.5).view(-1, 1, 1, 1), mirror(x), x)
        y = self.labels[chosen].masked_fill(dropped < 0.1, self.null_class)
        times = self.objective.draw_times(self.args.batch, self.generator)
        noise = torch.randn(x.shape, **options)
        for own, new in zip(self.inputs, (x, y, times, noise), strict=True):
            own.copy_(new)

    def step(self):
        """Update the weights once; return the mean squared error of the noise."""
        x, labels, times, noise = self.inputs
        noisy = self.objective.add_noise(x, noise, times)
        enabled = self.arm["precision"] == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            output = self.model(noisy, times, labels)
        mse, vlb = self.objective.loss(output.sample, x, noise, times)
        loss = mse.mean() + vlb.mean()
        if output.load_balance_loss is not None:
            loss = loss + BALANCE_WEIGHT * output.load_balance_loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mse.mean().detach()

    def captured(self):
        """Capture :meth:`step` in a CUDA graph, reset the weights, and return the replay."""
        initial = [weight.detach().clone() for weight in self.weights]
        for _ in range(3):
            self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()  # gradient accumulators remember their first stream
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            loss = self.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, initial)
            for state in self.optimizer.state.values():
                torch._foreach_zero_(list(state.values()))

        def replay():
            graph.replay()
            return loss

        return replay

    def run(self):
        """Train; return the loss of every step."""
        args = self.args
        on_gpu = self.latents.is_cuda
        losses = torch.zeros(args.steps, device=self.latents.device)
        stream = torch.cuda.Stream() if on_gpu else None
        attention = DENSE_BACKENDS.get(self.arm["attention"]) if on_gpu else None
        with (
            torch.cuda.stream(stream) if stream else contextlib.nullcontext(),
            sdpa_kernel(attention) if attention else contextlib.nullcontext(),
        ):
            step = self.captured() if on_gpu else self.step
            for index in range(args.steps):
                self.draw(1 + index)
                position = index / (args.schedule_steps or args.steps)
                self.rate.fill_(args.learning_rate * 0.5 * (1 + math.cos(math.pi * position)))
                losses[index] = step()
            return losses.tolist()


def mirror(x):
    """Return latents (B, 12, h, w) of mirrored images: columns within a 2×2 block swap, too."""
    return x.unflatten(1, (-1, 2, 2)).flip(3).flatten(1, 3).flip(-1)


def start_worker(devices, args):
    """Take a GPU and load the data onto it."""
    global DATA
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(args.threads)
    device = torch.device(devices.get())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    DATA = load_latents(args.data, args.image_size, args.images, device)


def run_arm(arm, args, deadline):
    """Return the row of an arm, or ``None`` after the deadline."""
    if time.time() > deadline:
        return None
    began = time.time()
    losses = Training(arm, args, *DATA).run()
    gc.collect()  # the graph and its memory
    torch.cuda.empty_cache()
    return dict(**arm, images=len(DATA[0]), batch=args.batch, steps=args.steps,
                learning_rate=args.learning_rate, seconds=round(time.time() - began),
                losses=[round(loss, 6) for loss in losses])  # fmt: skip


def label(row):
    parts = [row["attention"], "compiled" if row["compiled"] else "eager"]
    parts += ["plain adaLN"] if row["adaln"] == "reference" else []
    parts += [f"perturbed {row['perturbed']}"] if row["perturbed"] else []
    return ", ".join(parts)


def print_table(columns, rows):
    """Print rows of cells as a Markdown table."""
    for cells in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells), "|")
    print()


def spread(curves):
    """Return the greatest relative difference of two curves in one window, and in the last half."""
    if len(curves) < 2:
        return ["", ""]
    ratios = [(max(means) - min(means)) / min(means) for means in zip(*curves, strict=True)]
    return [f"{max(part):.2%}" for part in (ratios, ratios[len(ratios) // 2 :])]


def report(rows, num_windows):
    """Print the loss of every arm, the spreads, and MoH over dense at equal steps."""
    steps = rows[0]["steps"]
    edges = [round(steps * i / num_windows) for i in range(num_windows + 1)]
    titles = [*(f"to {edge}" for edge in edges[1:]), "last half"]
    groups = {}
    for row in rows:
        losses = row["losses"]
        curve = [statistics.fmean(losses[a:b]) for a, b in itertools.pairwise(edges)]
        half = statistics.fmean(losses[steps // 2 :])
        key = (row["model"], row["precision"], row["seed"])
        groups.setdefault(key, []).append((row, curve, half))
    heads = ["model", "precision", "seed"]
    print("Mean squared error of the noise, mean of each window of steps:\n")
    cells = []
    for key, group in groups.items():
        cells += [[*key, label(row), *curve, half] for row, curve, half in group]
    print_table([*heads, "arm", *titles], cells)

    print("Greatest relative difference of two arms in one window, and in one of the last half:\n")
    spreads = []
    for key, group in groups.items():
        ways = [curve for row, curve, _ in group if not row["perturbed"]]
        copies = [curve for row, curve, _ in group if row is group[0][0] or row["perturbed"]]
        if len(group) > 1:
            spreads.append([*key, len(ways), *spread(ways), len(copies) - 1, *spread(copies)])
    both = ["any window", "last half"]
    print_table([*heads, "ways to compute", *both, "perturbed copies", *both], spreads)

    print("Loss over that of the dense model, base arms:\n")
    base = {key: [*group[0][1], group[0][2]] for key, group in groups.items()}
    ratios = []
    for (model, *key), curve in base.items():
        dense = base.get(("small" if model.startswith("small") else DENSE, *key))
        if dense and is_moh(model):
            ratios.append([model, *key, *(m / d for m, d in zip(curve, dense, strict=True))])
    print_table([*heads, *titles], ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="images: a folder with one sub-folder per class, or the like")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[SPARSE, DENSE], metavar="M")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--copies", type=int, default=4, help="perturbed copies of a base arm")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--image_size", type=int, default=64, help="twice the side of the latents")
    parser.add_argument("--images", type=int, help="train on this many, drawn at random")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="cosine to zero")
    parser.add_argument("--schedule_steps", type=int, help="of the cosine, if not --steps")
    parser.add_argument("--windows", type=int, default=10, help="that the steps are averaged in")
    parser.add_argument("--workers", type=int, default=2, help="processes per GPU")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU, per process")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no arm after these")
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    print(environment())
    arms = make_arms(args.models, args.precisions, args.seeds, args.variants, args.copies)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] * args.workers or ["cpu"]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    deadline = time.time() + 60 * args.minutes
    done, rows, failed = {}, [], False
    with ProcessPoolExecutor(
        len(devices), context, initializer=start_worker, initargs=(queue, args)
    ) as pool:
        started = {pool.submit(run_arm, arm, args, deadline): arm for arm in arms}
        for future in as_completed(started):
            arm = started[future]
            try:
                row = future.result()
            except Exception as error:  # keep the results of the other arms
                row, result = None, f"{type(error).__name__}: {error}"
                failed = True
            else:
                result = f"{row['losses'][-1]:.4f}, {row['seconds']} s" if row else "no time left"
            done[arms.index(arm)] = row
            print(f"{arm['model']}, {arm['precision']}, {label(arm)}: {result}", flush=True)
            rows = [done[index] for index in sorted(done) if done[index]]
            write_json(args.json, rows)
    if rows:
        report(rows, args.windows)
    sys.exit(failed)


if __name__ == "__main__":
    main()
