"""Time sampling: the model alone, the sampling loop, per-image noise, decoding and writing.

    python benchmarks/sampling.py --json sampling.json             # one GPU: everything
    python benchmarks/sampling.py --parts graphs --compile_mode "" # one GPU: CUDA graphs, caches
    python benchmarks/sampling.py --parts seeds --device cpu       # any machine

The part ``throughput`` prints ``forward_per_s`` (evaluations per second of the compiled model
alone, as a CUDA graph, at the batch size of a guided step), ``loop_share_of_forward`` (the fraction
of this rate that the sampling loop reaches) and ``end_to_end_images_per_s`` (with decoding and
writing, without the first batch). The part ``graphs`` samples 16 images in 20 guided steps, without
decoding. It prints the start-up (compilation, capture), ``over_forward`` (the time of the loop over
that of its forward passes alone, as CUDA graphs), and whether the latents equal those without
graphs. Weights are random; the autoencoder has the architecture of stabilityai/sd-vae-ft-ema.
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
from common import environment, table, time_graph, write_json
from diffusers import AutoencoderKL

from moh_dit.diffusion.noise import ImageNoise
from moh_dit.diffusion.process import make_scheduler
from moh_dit.diffusion.samplers import prepare_scheduler
from moh_dit.model.presets import build_model
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline
from moh_dit.pipeline.step_cache import StepCache, caching
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
GRAPH_CASES = ["MoH-DiT-XL/2-75", "DiT-XL/2"]
WAYS = {
    "python": None,
    "graphs": None,
    "graphs, first-block 0.05": StepCache("first-block", threshold=0.05),
    "graphs, taylorseer 2": StepCache("taylorseer", interval=2),
    "graphs, taylorseer 5": StepCache("taylorseer", interval=5),
    "graphs, magcache 0.06": StepCache("magcache", threshold=0.06),
}


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
    """Return evaluations per second of the model alone, replayed as a CUDA graph."""
    model = pipeline.transformer
    size, device = model.config.sample_size, model.device
    latents = torch.randn(batch, 4, size, size, device=device, dtype=model.dtype)
    timesteps = torch.full((batch,), 500, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    return 1000 * batch / time_graph(lambda: model(latents, timesteps, labels))


def make_requests(batch):
    """Return requests of images 0 … batch - 1, one of each class."""
    requests = np.zeros(batch, REQUEST)
    requests["index"], requests["label"] = np.arange(batch), np.arange(batch) % 1000
    return requests


@torch.no_grad()
def throughput(case, device, compile_mode):
    """Measure one case."""
    preset, image_size, batch, sampler, steps, interval = case
    pipeline = make_pipeline(preset, image_size, device, torch.bfloat16, compile_mode)
    settings = SamplingSettings(
        scheduler=sampler, num_inference_steps=steps, guidance_scale=1.5, guidance_interval=interval
    )
    chosen, guidance = use_settings(pipeline, settings)
    requests = make_requests(batch)
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
def graphs(preset, device, compile_mode, batch=16, steps=20):
    """Time a small batch with and without CUDA graphs, and with each cache."""
    settings = SamplingSettings(
        scheduler="dpmsolver++", num_inference_steps=steps, guidance_scale=1.5
    )
    pipeline = make_pipeline(preset, 256, device, torch.bfloat16, compile_mode)
    requests, rows, latents = make_requests(batch), [], {}
    for way, cache in WAYS.items():
        chosen, guidance = use_settings(pipeline, settings)
        chosen.graphs.mode = way != "python"

        def loop(chosen=chosen, guidance=guidance):
            return denoise_batch(chosen, guidance, settings, requests)

        torch.cuda.reset_peak_memory_stats()
        with evaluation_mode(pipeline.transformer):
            began = time.perf_counter()
            with caching(chosen, cache, guidance, steps):
                first, latents[way] = loop(), loop()
                synchronize(device)
                startup = time.perf_counter() - began
                seconds = wall(loop, device, 5)
        rows.append(
            dict(
                model=preset,
                image_size=256,
                batch=batch,
                steps=steps,
                way=way,
                images_per_s=batch / seconds,
                seconds=seconds,
                startup_s=startup - 2 * seconds,
                over_forward=0.0,
                equal=str(bool(torch.equal(latents[way], latents["python"]))),
                repeats=str(bool(torch.equal(first, latents[way]))),
                memory_gib=torch.cuda.max_memory_reserved() / 2**30,
            )
        )
        chosen.graphs.release()
    forward = steps * 2 * batch / forward_rate(pipeline, 2 * batch)
    for row in rows:
        row["over_forward"] = row["seconds"] / forward
    return rows


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
    parts = ["throughput", "graphs", "seeds", "tolerance"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--cases", nargs="+", type=int, help="row numbers of each part (default: all)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--compile_mode",
        default="default",
        choices=["default", "max-autotune-no-cudagraphs", ""],
        help="default compiles each block; '' compiles nothing",
    )
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    mode = arguments.compile_mode if on_cuda else None
    rows = dict(
        throughput=CASES,
        graphs=GRAPH_CASES,
        seeds=[
            ("MoH-DiT-XL/2-75", 256, 128),
            ("MoH-DiT-S/2-75", 256, 128),
        ]
        if on_cuda
        else [("MoH-DiT-S/2-75", 64, 16), (TINY, 64, 16)],
        tolerance=["float32", "bfloat16"],
    )
    measure = dict(throughput=throughput, graphs=graphs, seeds=seeds, tolerance=tolerance)
    print(environment())
    results = []
    for part in arguments.parts:
        done = []
        for number, case in enumerate(rows[part]):
            if arguments.cases and number not in arguments.cases:
                continue
            torch._dynamo.reset()
            gc.collect()
            measured = measure[part](case, device, mode)
            done += measured if isinstance(measured, list) else [measured]
            print(part, measured, flush=True)
            # After every case, so that an interrupted run keeps the results.
            write_json(arguments.json, [*results, *(dict(part=part, **row) for row in done)])
        results += [dict(part=part, **row) for row in done]
        table(done, list(done[0]))


if __name__ == "__main__":
    main()
