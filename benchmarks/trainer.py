"""Time train_dit.py with latents on disk, on one GPU and on all GPUs of a machine.

    python benchmarks/trainer.py --work /tmp/trainer [--parts data single ...] [--json out.json]
    python benchmarks/trainer.py --work /tmp/trainer --parts data single --batch 16 32 64 128 \\
        --cuda_graphs auto false --plot trainer.png

Prints images/s, MFU, peak memory, time waiting for data, and the speed-up over one GPU. Values are
medians over the log entries after the first. Latents are 4×32×32, as for 256 px and a factor-8
autoencoder; they are made from random images of 128 px by the embedded factor-4 autoencoder.
Training is bf16, compiled, with fused AdamW and one EMA.

"single" trains on every GPU separately, on all at the same time, and the speed-up is relative to
their mean: cards of one kind differ by some per cent. "resume" kills a run by SIGKILL, resumes it,
and compares its final state, byte for byte, with an uninterrupted run.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from common import draw_curves, environment, table, write_json
from PIL import Image

from moh_dit.training.run_log import read_log

ROOT = Path(__file__).parents[1]
MODELS = ["DiT-XL/2", "MoH-DiT-XL/2-75"]
NUM_IMAGES, NUM_CLASSES, PIXELS = 2560, 8, 128
ENTRIES = 5  # number of measured log entries, of ten steps each
STATE = ["state/model.safetensors", "state/optimizer.safetensors",
         "transformer/diffusion_pytorch_model.safetensors"]  # fmt: skip


def make_latents(work: Path) -> None:
    """Write random images into one folder per class, and encode them."""
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        folder = work / "images" / f"class {number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    run([sys.executable, "-m", "moh_dit", "encode", "--data", str(work / "images"),
         "--image_size", str(PIXELS), "--autoencoder", "digits",
         "--output", str(work / "latents")], work / "encode.log").wait()  # fmt: skip


def run(command: list[str], log: Path, gpus: str | None = None) -> subprocess.Popen:
    """Start a command in the repository; its output is appended to the log file."""
    variables = dict(os.environ, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    if gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpus
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)


def training(work: Path, name: str, preset: str, batch: int, launch: list[str], **settings):
    """Return the command of a training run, and its folder."""
    folder = work / name
    options = {
        "run_dir": folder, "model.preset": preset, "data.latents": work / "latents",
        "data.image_size": PIXELS, "data.horizontal_flip": "true", "batch_size": batch,
        "mixed_precision": "bf16", "compile": "true", "log_every": 10, "num_steps": 10**6,
        "evaluation.num_inference_steps": 4, **settings,
    }  # fmt: skip
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [*launch, str(ROOT / "train_dit.py"), *flags], folder


def launcher(config: str, processes: int) -> list[str]:
    file = ROOT / "configs" / "accelerate" / config
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--num_processes", str(processes)]  # fmt: skip


def logged(folder: Path) -> list[dict]:
    """Return the log entries of a run so far, without the first, which includes compilation."""
    return read_log(folder / "log.jsonl")[1:]


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait until a run has logged enough entries, then kill it."""
    while process.poll() is None and len(logged(folder)) < ENTRIES:
        time.sleep(0.2)
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)  # workers have their own process groups
        for each in [*parent.children(recursive=True), parent]:
            each.kill()
    process.wait()


def result(folder: Path, log: Path, **row) -> dict:
    """Return a row of the table from the log of a run; ``row`` has its first columns."""
    entries = logged(folder)
    if len(entries) < ENTRIES:
        print(log.read_text()[-3000:])
        return row | dict(images_per_s=float("nan"))

    def middle(key: str) -> float:
        return statistics.median(entry.get(key, float("nan")) for entry in entries)

    return row | dict(
        images_per_s=middle("images_per_second"), mfu=middle("mfu"),
        peak_GiB=middle("peak_memory_gib"), reserved_GiB=middle("peak_reserved_gib"),
        data_wait=middle("data_wait"), loss=middle("loss"),
    )  # fmt: skip


def measure(work: Path, launch: str, batch: int, cuda_graphs: str, preset: str) -> list[dict]:
    """Train on each GPU separately, all at the same time ("single"), or on all GPUs together.

    ``batch`` is the number of images per GPU.
    """
    count = torch.cuda.device_count()
    processes = 1 if launch == "single" else count
    start = [sys.executable]
    if launch != "single":
        start = launcher({"ddp": "ddp_8gpu.yaml", "fsdp2": "fsdp2.yaml"}[launch], count)
    jobs = []
    for gpu in range(count // processes):
        name = f"{preset.replace('/', '_')}, {batch}, {cuda_graphs}, {launch} {gpu}"
        command, folder = training(
            work, name, preset, batch * processes, start, cuda_graphs=cuda_graphs
        )
        log = work / f"{name}.log"
        jobs.append((run(command, log, str(gpu) if launch == "single" else None), folder, log))
    for process, folder, _ in jobs:
        finish(process, folder)
    return [
        result(folder, log, model=preset, launch=launch, gpus=processes, gpu=gpu,
               batch=batch * processes, cuda_graphs=cuda_graphs)
        for gpu, (_, folder, log) in enumerate(jobs)
    ]  # fmt: skip


def checked_resume(work: Path, preset: str) -> dict:
    """Kill a deterministic run after its first checkpoint, resume it, compare the final state."""
    common = dict(deterministic="true", checkpoint_every=10, num_steps=30)
    gpu = str(torch.cuda.device_count() - 1)

    def command(name: str, **more):
        return training(work, name, preset, 32, [sys.executable], **common, **more)

    whole, alone = command("alone")
    run(whole, work / "alone.log", gpu).wait()
    first, killed = command("killed")
    process = run(first, work / "killed.log", gpu)
    while process.poll() is None and not (killed / "checkpoints" / "step-00000010").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run([*first, "--resume"], work / "killed.log", gpu).wait()
    last = Path("checkpoints") / "step-00000030"
    same = all((alone / last / f).read_bytes() == (killed / last / f).read_bytes() for f in STATE)
    starts = (killed / "environment.jsonl").read_text().splitlines()
    return dict(model=preset, resumed_from=[json.loads(line)["start_step"] for line in starts],
                bit_identical=same)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--parts", nargs="+", default=["data", "single", "resume", "ddp", "fsdp2"])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[160], help="images per GPU and step"
    )
    parser.add_argument(
        "--cuda_graphs", nargs="+", choices=["auto", "true", "false"], default=["auto"]
    )
    parser.add_argument("--resume_model", default="MoH-DiT-S/2-75")
    parser.add_argument("--json")
    parser.add_argument("--plot", help="file for curves of images/s over the batch size")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(environment(), torch.cuda.device_count(), "GPUs")
    rows: list[dict] = []
    alone: dict[tuple, float] = {}
    for part in args.parts:
        began = time.monotonic()
        if part == "data":
            make_latents(args.work)
        elif part == "resume":
            print(checked_resume(args.work, args.resume_model))
        else:
            for case in itertools.product(args.batch, args.cuda_graphs, args.models):
                new = measure(args.work, part, *case)
                if part == "single":
                    alone[case] = statistics.mean(row["images_per_s"] for row in new)
                for row in new:
                    row["scaling"] = row["images_per_s"] / alone.get(case, float("nan"))
                rows += new
                write_json(args.json, rows)
            table(rows, list(rows[-1]))
            draw_curves(args.plot, rows, ["launch", "cuda_graphs"])
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
