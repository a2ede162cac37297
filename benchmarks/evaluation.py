"""Times of fid_eval, for the section "Evaluation" of docs/performance.md.

    python benchmarks/evaluation.py gpu --work /tmp/evaluation --output evaluation.json
    python benchmarks/evaluation.py neighbours            # precision and recall alone, any machine

Images are synthetic (coarse random fields with noise, about 100 KB as PNG) and Inception's weights
random but seeded: the amount of work is that of real ones, the numbers mean nothing. `gpu` runs the
command itself in processes of its own, beside torch-fidelity's on the same files.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fid_eval.hashing import file_sha256
from fid_eval.metrics import precision_recall

SIDE = 256
BLOCK = 500  # images made by one task


def make_images(seed: int, count: int) -> np.ndarray:
    """uint8 (count, 256, 256, 3): random colours on a coarse grid, enlarged, with noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 9, 9, 3), np.uint8)
    noise = generator.integers(0, 10, (64, SIDE, SIDE, 3), np.uint8)
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for index in range(count):
        smooth = Image.fromarray(coarse[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        images[index] = np.asarray(smooth) // 2 + noise[index % 64]
    return images


def write_block(task: tuple[int, int, str, str, int]) -> None:
    """Make one block: its rows of the array file, and its PNGs up to a number."""
    seed, block, array, folder, pngs = task
    images = make_images(seed + block, BLOCK)
    with open(array, "r+b") as file:
        file.seek(128 + block * images.nbytes)  # 128: the array file's header
        file.write(images.data)
    for index in range(min(BLOCK, max(0, pngs - block * BLOCK))):
        path = Path(folder) / f"{block * BLOCK + index:06d}.png"
        Image.fromarray(images[index]).save(path, compress_level=1)


def write_set(work: Path, name: str, count: int, pngs: int, pool: ProcessPoolExecutor) -> None:
    """``name``.npz of ``count`` images (stored, as numpy.savez writes it) and a folder of PNGs."""
    header = io.BytesIO()
    shape = (count, SIDE, SIDE, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    raw = work / f"{name}.npy"
    with raw.open("wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + int(np.prod(shape)))
    assert len(header.getvalue()) == 128
    folder = work / f"{name}_png"
    folder.mkdir()
    seed = {"samples": 0, "reference": 10**6}[name]
    tasks = [(seed, block, str(raw), str(folder), pngs) for block in range(count // BLOCK)]
    list(pool.map(write_block, tasks))
    with zipfile.ZipFile(work / f"{name}.npz", "w", zipfile.ZIP_STORED) as archive:
        archive.write(raw, "arr_0.npy")
    raw.unlink()


def random_inception(path: Path) -> None:
    """Seeded weights in the published file's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    net = Unloaded("inception-v3-compat", ["2048"], empty)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)


class Report:
    """Findings, written as they come, so that a run cut short keeps what it has."""

    def __init__(self, path: Path | None, deadline: float) -> None:
        self.path, self.deadline, self.start = path, deadline, time.monotonic()
        self.values: dict[str, object] = {}

    def add(self, name: str, value: object) -> None:
        self.values[name] = value
        print(f"[{time.monotonic() - self.start:6.1f} s] {name}: {value}", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.values, indent=1))

    def left(self) -> float:
        return self.deadline - (time.monotonic() - self.start)

    def timed(self, name: str, command: list[str], needs: float) -> str | None:
        """Wall seconds of a command; skipped, and said so, if ``needs`` seconds are not left."""
        if self.left() < needs:
            self.add(name, f"not run: {self.left():.0f} s left")
            return None
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.left())
        except subprocess.TimeoutExpired:
            self.add(name, f"stopped after {time.monotonic() - started:.1f} s")
            return None
        seconds = time.monotonic() - started
        if done.returncode:
            self.add(name, f"failed: {done.stderr[-600:]}")
            return None
        self.add(name, round(seconds, 2))
        return done.stdout


def throughput(weights: Path, precision: str, compiled: bool, batch: int, nchw: bool) -> float:
    """Images/s of the network alone on images that are on the GPU already."""
    from fid_eval.extractors import get_extractor, network_precision

    extractor = get_extractor("inception", weights, file_sha256(weights))
    extractor.load(torch.device("cuda"), compiled)
    if nchw:
        extractor.network.to(memory_format=torch.contiguous_format)
    images = torch.from_numpy(make_images(7, batch)).cuda().permute(0, 3, 1, 2)
    with torch.inference_mode(), network_precision(precision):
        for _ in range(3):
            extractor(images)
        torch.cuda.synchronize()
        started, count = time.monotonic(), 0
        while time.monotonic() - started < 1.5:
            extractor(images)
            count += batch
            torch.cuda.synchronize()
    return count / (time.monotonic() - started)


def gpu(options: argparse.Namespace) -> None:
    work = Path(options.work)
    work.mkdir(parents=True)
    report = Report(Path(options.output) if options.output else None, options.deadline)
    report.add("machine", f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, "
               f"torch {torch.__version__}")  # fmt: skip
    weights = work / "inception.pth"
    random_inception(weights)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        write_set(work, "samples", options.images, options.pngs, pool)
        write_set(work, "reference", options.reference, options.reference, pool)
    report.add("data made", True)
    png = sum(f.stat().st_size for f in (work / "reference_png").iterdir()) / options.reference
    report.add("mean PNG, bytes", round(png))

    base = [sys.executable, "-m", "fid_eval", "--weights", str(weights), "--weights-sha256",
            file_sha256(weights), "--quiet", "--json"]  # fmt: skip
    npz = [str(work / "reference.npz"), str(work / "samples.npz")]
    folders = [str(work / "reference_png"), str(work / "samples_png")]
    results = {}

    def ours(name: str, paths: list[str], *more: str, needs: float = 60) -> None:
        printed = report.timed(name, [*base, *paths, *more], needs)
        if printed is not None:
            results[name] = json.loads(printed)["sets"][0]
            found = results[name]
            report.add(f"{name}: images/s of the samples' pass",
                       round(found["samples"]["images_per_second"]))  # fmt: skip
            report.add(f"{name}: metrics", found["metrics"])

    ours("npz, five metrics, float32", npz)
    ours("PNG, fid is precision recall, float32", folders, "--metrics", "fid,is,precision,recall")
    report.timed("PNG, torch-fidelity: fid isc prc", [
        sys.executable, "-m", "torch_fidelity.fidelity", "--gpu", "0", "--fid", "--isc", "--prc",
        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path",
        str(weights), "--input1", folders[1], "--input2", folders[0], "--no-cache", "--json",
    ], 30)  # fmt: skip
    ours("PNG, fid is precision recall, tf32", folders, "--metrics", "fid,is,precision,recall",
         "--precision", "tf32", needs=20)  # fmt: skip
    report.add("precision and recall, fp32", neighbours("cuda", "fp32"))
    report.add("precision and recall, adm-fp16", neighbours("cuda", "adm-fp16"))
    for precision, compiled, batch, nchw in (
        ("float32", False, 128, False), ("float32", False, 128, True), ("tf32", False, 128, False),
        ("bf16", False, 128, False), ("tf32", True, 128, False), ("bf16", True, 128, False),
        ("float32", True, 128, False),
    ):  # fmt: skip
        name = f"network {precision} batch {batch}" + " compiled" * compiled + " NCHW" * nchw
        if report.left() < (50 if compiled else 10):
            report.add(name, f"not run: {report.left():.0f} s left")
        else:
            report.add(name, round(throughput(weights, precision, compiled, batch, nchw)))
    ours("npz, five metrics, bf16", npz, "--precision", "bf16", needs=40)
    ours("npz, five metrics, tf32", npz, "--precision", "tf32", needs=40)


def neighbours(device: str, mode: str, reference: int = 10_000, samples: int = 50_000) -> dict:
    """Seconds for precision and recall of 10,000 × 50,000 features of 2048 dimensions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(64, 2048, generator=generator)
    a, b = (
        (torch.randn(n, 64, generator=generator) @ basis / 40).relu_() for n in (reference, samples)
    )
    a, b = a.to(device), b.to(device)
    if device != "cpu":
        precision_recall(a[:2000], b[:2000], mode)  # library handles, kernels
        torch.cuda.synchronize()
    started, used = time.monotonic(), time.process_time()
    precision, recall = precision_recall(a, b, mode)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(time.process_time() - used, 2),  # over all threads
        "precision": precision,
        "recall": recall,
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gpu")
    command.add_argument("--work", required=True, help="new folder for 20 GB of images")
    command.add_argument("--output", help="JSON of the findings")
    command.add_argument("--images", type=int, default=50_000)
    command.add_argument("--reference", type=int, default=10_000)
    command.add_argument("--pngs", type=int, default=50_000, help="samples that are PNGs too")
    command.add_argument("--deadline", type=float, default=3600, help="seconds for everything")
    command = commands.add_parser("neighbours")
    command.add_argument("--device", default="cpu")
    command.add_argument("--mode", choices=["fp32", "adm-fp16"], default="fp32")
    options = parser.parse_args()
    if options.command == "gpu":
        gpu(options)
    else:
        print(f"{torch.get_num_threads()} threads", neighbours(options.device, options.mode))


if __name__ == "__main__":
    main()
