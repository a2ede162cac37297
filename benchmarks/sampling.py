"""Time sampling: the model alone, the sampling loop, per-image noise, decoding and writing.

    python benchmarks/sampling.py --json sampling.json             # one GPU: everything
    python benchmarks/sampling.py --parts seeds --device cpu       # any machine

Prints, for each case, ``forward_per_s`` (evaluations per second of the compiled model alone, at the
batch size of a guided step), ``loop_share_of_forward`` (the fraction of this rate that the sampling
loop reaches) and ``end_to_end_images_per_s`` (with decoding and writing, without the first batch).
Weights are random; the autoencoder has the architecture of stabilityai/sd-vae-ft-ema.
"""

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import environment, table, write_json
from diffusers import AutoencoderKL

from moh_dit.diffusion.noise import ImageNoise
from moh_dit.diffusion.process import make_scheduler
from moh_dit.diffusion.samplers import prepare_scheduler
from moh_dit.model.presets import build_model
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.engine import REQUEST, denoise_batch, evaluation_mode, use_settings
from moh_dit.sampling.sample_set import sample_set, set_labels

FULL, LIMITED = (0.0, 1.0), (0.1, 0.7)
TINY = dict(hidden_size=192, depth=6, num_heads=6, num_shared_heads=2, num_active_routed_heads=2)
# model, image size, batch, sampler, steps, guidance interval
CASES = [
    ("MoH-DiT-XL/2-75", 256, 32, "ddpm", 250, FULL),
    ("MoH-DiT-XL/2-75", 256, 128, "dpmsolver++", 20, FULL),
    ("MoH-DiT-XL/2-75", 256, 128, "dpmsolver++", 20, LIMITED),
    ("MoH-DiT-XL/2-90", 256, 128, "dpmsolver++", 20, FULL),
    ("DiT-XL/2", 256, 128, "dpmsolver++", 20, FULL),
    ("MoH-DiT-XL/2-75", 512, 8, "ddpm", 250, FULL),
    ("MoH-DiT-XL/2-75", 512, 32, "dpmsolver++", 20, FULL),
    ("MoH-DiT-XL/2-75", 512, 32, "dpmsolver++", 20, LIMITED),
]


def make_pipeline(preset, image_size, device, dtype, compile_mode):
    """Return a pipeline with random weights, also in zero-initialized layers."""
    torch.manual_seed(0)
    if preset is TINY:
        model = MoHDiTTransformer2DModel(sample_size=image_size // 8, **TINY)
    else:
        model = build_model(preset, sample_size=image_size // 8)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    vae = vae.eval().requires_grad_(False).to(device, dtype)
    pipeline = MoHDiTPipeline(model.to(device, dtype), vae, make_scheduler())
    model.fuse_qkv_projections()
    if compile_mode == "default":  # as in sampling
        model.compile_repeated_blocks(dynamic=False)
    elif compile_mode:
        model.compile(mode=compile_mode, dynamic=False)
    return pipeline


def wall(call, device, repeats):
    """Return the median seconds of ``call``."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def forward_rate(pipeline, batch):
    """Return evaluations per second of the model alone."""
    model = pipeline.transformer
    size, device = model.config.sample_size, model.device
    latents = torch.randn(batch, 4, size, size, device=device, dtype=model.dtype)
    timesteps = torch.full((1,), 500, device=device).expand(batch)
    labels = torch.randint(1000, (batch,), device=device)

    def several():
        for _ in range(10):
            model(latents, timesteps, labels)

    several()
    return 10 * batch / wall(several, device, 5)


@torch.no_grad()
def throughput(case, device, compile_mode):
    """Measure one case."""
    preset, image_size, batch, sampler, steps, interval = case
    pipeline = make_pipeline(preset, image_size, device, torch.bfloat16, compile_mode)
    settings = SamplingSettings(
        scheduler=sampler, num_inference_steps=steps, guidance_scale=1.5, guidance_interval=interval
    )
    chosen, guidance = use_settings(pipeline, settings)
    requests = np.zeros(batch, REQUEST)
    requests["index"], requests["label"] = np.arange(batch), np.arange(batch) % 1000
    timesteps = prepare_scheduler(chosen.scheduler, steps).timesteps
    guided = sum(guidance.active_at(timestep, 1000) for timestep in timesteps)
    alone = {size: forward_rate(pipeline, size) for size in (batch, 2 * batch)}
    ideal = guided * 2 * batch / alone[2 * batch] + (len(timesteps) - guided) * batch / alone[batch]

    def loop():
        return denoise_batch(chosen, guidance, settings, requests)

    with evaluation_mode(pipeline.transformer):
        latents = denoise_batch(
            chosen, guidance, replace(settings, num_inference_steps=4), requests
        )
        seconds = wall(loop, device, 1 if steps > 100 else 3)
        pipeline.decode(latents, batch)
        decoding = wall(lambda: pipeline.decode(latents, batch), device, 3)
    batches = 2 if steps > 100 else 5
    labels = set_labels(batches * batch, range(1000), "balanced", 0)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "samples.npz"
        whole = sample_set(pipeline, settings, output, labels, batch_size=batch, quiet=True)
    return dict(
        model=preset,
        image_size=image_size,
        batch=batch,
        sampler=sampler,
        steps=steps,
        guidance_interval=interval,
        guided_steps=int(guided),
        forward_per_s=alone[2 * batch],
        loop_images_per_s=batch / seconds,
        loop_share_of_forward=ideal / seconds,
        decode_images_per_s=batch / decoding,
        end_to_end_images_per_s=whole,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30,
    )


@torch.no_grad()
def seeds(case, device, compile_mode):
    """Compare per-image noise with one generator for the batch, in stochastic DDPM."""
    preset, image_size, batch = case
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = make_pipeline(preset, image_size, device, dtype, compile_mode)
    settings = SamplingSettings(num_inference_steps=20, guidance_scale=1.5)
    chosen, guidance = use_settings(pipeline, settings)
    labels = torch.arange(batch, device=device)

    def one_per_image():
        return [torch.Generator(device).manual_seed(index) for index in range(batch)]

    kinds = {
        "one generator": lambda: torch.Generator(device).manual_seed(0),
        "a generator per image": one_per_image,
        "counter-based per image": lambda: ImageNoise(0, range(batch), device),
    }
    # In turns, so that other load on the machine affects all kinds equally.
    times = {kind: [] for kind in kinds}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for turn in range(8):
        for kind, make in kinds.items():
            synchronize(device)
            began = clock()
            noise = make()
            latents = chosen.prepare_latents(batch, noise)
            chosen.denoise(latents, labels, guidance, settings.num_inference_steps, noise)
            synchronize(device)
            if turn:
                times[kind].append(clock() - began)
    best = {kind: min(values) for kind, values in times.items()}
    relative = {kind: value / best["one generator"] for kind, value in best.items()}
    return dict(model=preset, image_size=image_size, batch=batch, seconds=best["one generator"],
                **relative)  # fmt: skip


@torch.no_grad()
def tolerance(dtype, device, compile_mode):
    """Measure how much the bytes of images change with the batch size."""
    pipeline = make_pipeline("MoH-DiT-S/2-75", 256, device, getattr(torch, dtype), None)
    settings = SamplingSettings(num_inference_steps=50, guidance_scale=1.5)
    labels = set_labels(16, range(1000), "balanced", 0)
    images = {}
    for batch in (16, 7):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "samples.npz"
            sample_set(pipeline, settings, output, labels, batch_size=batch, quiet=True)
            images[batch] = np.load(output)["arr_0"].astype(int)
    difference = np.abs(images[16] - images[7])
    return dict(dtype=dtype, largest=int(difference.max()), mean=float(difference.mean()),
                equal=float((difference == 0).mean()))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["throughput", "seeds", "tolerance"])
    parser.add_argument(
        "--cases", nargs="+", type=int, help="row numbers of each part (default: all)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--compile_mode",
        default="default",
        help="default (each block), max-autotune, reduce-overhead, or '' for eager",
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    mode = arguments.compile_mode if on_cuda else None
    rows = dict(
        throughput=CASES,
        seeds=[
            ("MoH-DiT-XL/2-75", 256, 128),
            ("MoH-DiT-S/2-75", 256, 128),
        ]
        if on_cuda
        else [("MoH-DiT-S/2-75", 64, 16), (TINY, 64, 16)],
        tolerance=["float32", "bfloat16"],
    )
    measure = dict(throughput=throughput, seeds=seeds, tolerance=tolerance)
    print(environment())
    results = []
    for part in arguments.parts:
        done = []
        for number, case in enumerate(rows[part]):
            if arguments.cases and number not in arguments.cases:
                continue
            torch._dynamo.reset()
            gc.collect()
            done.append(measure[part](case, device, mode))
            print(part, done[-1], flush=True)
            results.append(dict(part=part, **done[-1]))
            write_json(
                arguments.json, results
            )  # after every row, so that an interrupted run keeps them
        table(done, list(done[0]))


if __name__ == "__main__":
    main()
