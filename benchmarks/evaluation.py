"""Times of fid_eval, for the section "Evaluation" of docs/performance.md.

    python benchmarks/evaluation.py gpu --work /tmp/evaluation --output evaluation.json
    python benchmarks/evaluation.py gpu --work /tmp/evaluation --sections png,network
    python benchmarks/evaluation.py neighbours            # precision and recall alone, any machine
    python benchmarks/evaluation.py decode                # a PNG on one core, any machine

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
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from fid_eval.metrics.adm import precision_recall
from fid_eval.sets.hashing import file_sha256

SIDE = 256
BLOCK = 100  # images made by one task
SEEDS = {"samples": 0, "reference": 10**6}
SECTIONS = ("npz", "png", "torch-fidelity", "neighbours", "network", "options")


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


def write_block(task: tuple[int, int, str, int, int]) -> None:
    """Make one block: its rows of the array file, or its PNGs, some under several names."""
    seed, block, target, count, different = task
    images = make_images(seed + block, BLOCK)
    if target.endswith(".npy"):
        with open(target, "r+b") as file:
            file.seek(128 + block * images.nbytes)  # 128: the array file's header
            file.write(images.data)
        return
    for index in range(BLOCK):
        number = block * BLOCK + index
        path = Path(target) / f"{number:06d}.png"
        Image.fromarray(images[index]).save(path, compress_level=1)
        for copy in range(number + different, count, different):
            os.link(path, Path(target) / f"{copy:06d}.png")


def write_arrays(work: Path, name: str, count: int, pool: ProcessPoolExecutor) -> Path:
    """An .npz of ``count`` images, stored as numpy.savez does."""
    header = io.BytesIO()
    shape = (count, SIDE, SIDE, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    assert len(header.getvalue()) == 128
    raw = work / f"{name}.npy"
    with raw.open("wb") as file:
        file.write(header.getvalue())
        file.truncate(128 + int(np.prod(shape)))
    tasks = [(SEEDS[name], b, str(raw), count, count) for b in range(count // BLOCK)]
    list(pool.map(write_block, tasks))
    with zipfile.ZipFile(work / f"{name}.npz", "w", zipfile.ZIP_STORED) as archive:
        archive.write(raw, "arr_0.npy")
    raw.unlink()
    return work / f"{name}.npz"


def write_pngs(
    work: Path, name: str, count: int, different: int, pool: ProcessPoolExecutor
) -> Path:
    """A folder of ``count`` PNGs, ``different`` of them written and the others linked to these."""
    folder = work / f"{name}_png"
    folder.mkdir()
    tasks = [(SEEDS[name], b, str(folder), count, different) for b in range(different // BLOCK)]
    list(pool.map(write_block, tasks))
    return folder


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


def throughput(weights: Path, precision: str, compiled: bool, batch: int, fused: bool) -> float:
    """Images/s of the network alone on images that are on the GPU already."""
    from fid_eval.networks import inception
    from fid_eval.networks.extractors import get_extractor, network_precision

    extractor = get_extractor("inception", weights, file_sha256(weights))
    extractor.load(torch.device("cuda"), compiled)
    images = torch.from_numpy(make_images(7, batch)).cuda().permute(0, 3, 1, 2)
    separate = patch.object(inception, "has_cudnn", lambda x: fused)
    with torch.inference_mode(), network_precision(precision), separate:
        for _ in range(3):
            extractor(images)
        torch.cuda.synchronize()
        started, count = time.monotonic(), 0
        while time.monotonic() - started < 1.2:
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
    base = [sys.executable, "-m", "fid_eval", "--weights", str(weights), "--weights-sha256",
            file_sha256(weights), "--quiet", "--json"]  # fmt: skip
    sections, sizes = options.sections, (options.reference, options.images)
    npz: list[Path] = []
    folders: list[Path] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        sides = list(zip(("reference", "samples"), sizes, strict=True))
        if {"npz", "options"} & set(sections):
            npz = [write_arrays(work, name, count, pool) for name, count in sides]
        if {"png", "torch-fidelity"} & set(sections):
            folders = [
                write_pngs(work, name, count, min(count, options.different), pool)
                for name, count in sides
            ]
    report.add("data made", True)

    def ours(name: str, paths: list[Path], *more: str, needs: float = 10) -> None:
        printed = report.timed(name, [*base, *map(str, paths), *more], needs)
        if printed is not None:
            found = json.loads(printed)["sets"][0]
            rate = round(found["samples"]["images_per_second"])
            report.add(f"{name}: images/s of the samples' pass", rate)
            stages = {stage: round(seconds, 2) for stage, seconds in found["seconds"].items()}
            report.add(f"{name}: stages", stages)
            report.add(f"{name}: metrics", found["metrics"])

    four = ("--metrics", "fid,is,precision,recall")
    if "npz" in sections:
        ours("npz, five metrics, float32", npz)
    if "png" in sections:
        ours("PNG, four metrics, tf32", folders, *four, "--precision", "tf32")
    if "torch-fidelity" in sections:
        report.timed(
            "PNG, torch-fidelity: fid isc prc (its convolutions are TF32 too)",
            [sys.executable, "-m", "torch_fidelity.fidelity", "--gpu", "0", "--fid", "--isc",
             "--prc", "--feature-extractor", "inception-v3-compat",
             "--feature-extractor-weights-path",
             str(weights), "--input1", str(folders[1]), "--input2", str(folders[0]), "--no-cache",
             "--json"], 20,
        )  # fmt: skip
    if "neighbours" in sections:
        for mode in ("fp32", "adm-fp16"):
            report.add(f"precision and recall, {mode}", neighbours("cuda", mode))
    if "network" in sections:
        for precision, compiled, fused in (
            ("float32", False, True), ("float32", False, False), ("tf32", False, True),
            ("tf32", False, False), ("bf16", False, True), ("bf16", False, False),
            ("tf32", True, True), ("bf16", True, True), ("float32", True, True),
        ):  # fmt: skip
            separate = ", normalised and ReLU apart" * (not fused)
            name = f"network {precision}" + " compiled" * compiled + separate
            if report.left() < (50 if compiled else 6):
                report.add(name, f"not run: {report.left():.0f} s left")
            else:
                report.add(name, round(throughput(weights, precision, compiled, 128, fused)))
    if "png" in sections:
        ours("PNG, four metrics, float32", folders, *four)
    if "options" in sections:
        for precision in ("tf32", "bf16"):
            ours(f"npz, five metrics, {precision}", npz, "--precision", precision)


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


def decode(count: int = 200) -> dict:
    """Milliseconds of processor time for a PNG of 256 px: as fid_eval decodes it, and by Pillow."""
    from fid_eval.sets.decoding import AS_IS
    from fid_eval.sets.decoding import decode as ours

    encoded = []
    for image in make_images(0, count):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        encoded.append(buffer.getvalue())

    def pillow(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)

    found = {"bytes": sum(map(len, encoded)) // count}
    for name, function in (("fid_eval", lambda data: ours(data, AS_IS)), ("pillow", pillow)):
        times = []
        for _ in range(5):
            used = time.process_time()
            for data in encoded:
                function(data)
            times.append(1000 * (time.process_time() - used) / count)
        found[name] = round(sorted(times)[2], 3)
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gpu")
    command.add_argument("--work", required=True, help="new folder for 20 GB of images")
    command.add_argument("--output", help="JSON of the findings")
    command.add_argument("--images", type=int, default=50_000)
    command.add_argument("--reference", type=int, default=10_000)
    command.add_argument("--different", type=int, default=50_000,
                         help="PNGs that are written; the others are links to these")  # fmt: skip
    command.add_argument("--sections", type=lambda text: text.split(","), default=SECTIONS,
                         help=f"of {','.join(SECTIONS)}")  # fmt: skip
    command.add_argument("--deadline", type=float, default=3600, help="seconds for everything")
    commands.add_parser("decode")
    command = commands.add_parser("neighbours")
    command.add_argument("--device", default="cpu")
    command.add_argument("--mode", choices=["fp32", "adm-fp16"], default="fp32")
    options = parser.parse_args()
    if options.command == "gpu":
        gpu(options)
    elif options.command == "decode":
        print(f"Pillow {version('pillow')}", decode())
    else:
        print(f"{torch.get_num_threads()} threads", neighbours(options.device, options.mode))


if __name__ == "__main__":
    main()
