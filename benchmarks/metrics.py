"""Time each metric of `fid_eval` on synthetic features: 10,000 reference images, 50,000 samples.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --metrics fid,mind --training

Prints one line per metric: seconds, value, and peak GPU memory. The features are on the device when
the clock starts; a first run with few rows warms up. `--training` also times a training run's
evaluation of 5,000 generated 256 px images with FID and MIND: images on the GPU, Inception with
seeded random weights, and both metrics.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import environment

from fid_eval import Evaluator
from fid_eval.fdr6 import PARTS
from fid_eval.features import Features
from fid_eval.metric_registry import METRICS, Comparison
from fid_eval.metrics.adm import mean_and_covariance
from fid_eval.networks.extractors import Extractor

CLASSES = 1000
DIMENSIONS = {"pool": 2048, "spatial": 2023}


def make_features(count, seed, device):
    """Return features of a set: rectified, of low rank plus noise, as those of Inception."""
    random = torch.Generator(device).manual_seed(seed)
    basis = torch.Generator(device).manual_seed(0)

    def rows(width):
        factor = torch.randn(64, width, generator=basis, device=device) / 40
        noise = torch.randn(count, width, generator=random, device=device) / 20
        signal = torch.randn(count, 64, generator=random, device=device) @ factor
        return (signal + noise + 0.02 * seed).relu_()

    rows = {layer: rows(width) for layer, width in DIMENSIONS.items()}
    stored = {layer: mean_and_covariance(values) for layer, values in rows.items()}
    labels = torch.arange(count) % CLASSES
    logits = rows["pool"] @ torch.randn(2048, CLASSES, generator=basis, device=device)
    return Features(count, rows, {}, stored, labels, logits)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_metrics(options, device):
    extractor = Extractor("inception", None, None, "", lambda: None)
    sizes = {"warm-up": (2 * CLASSES, 2 * CLASSES), "all": (options.reference, options.samples)}
    for stage, counts in sizes.items():
        sets = [make_features(count, seed, device) for seed, count in enumerate(counts)]
        for name in options.metrics:
            distances = "adm-fp16" if name in ("precision", "recall") else "fp32"
            comparison = Comparison(*sets, extractor, device, distances)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            started = time.monotonic()
            value = METRICS[name].compute(comparison)
            synchronize(device)
            seconds = time.monotonic() - started
            if stage == "all":
                peak = torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else 0
                print(f"{name:14} {seconds:8.2f} s   {value:12.5f}   {peak:6} MiB", flush=True)


def time_training(options, device):
    from evaluation import random_inception

    from fid_eval.networks.weight_files import file_sha256

    def images(count, seed):
        random = torch.Generator(device).manual_seed(seed)
        for start in range(0, count, 128):
            shape = (min(128, count - start), 3, 256, 256)
            yield torch.randint(256, shape, generator=random, device=device, dtype=torch.uint8)

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        random_inception(weights)
        evaluator = Evaluator(
            list(images(options.reference, 0)), ["fid", "mind"], weights=weights, device=device,
            weights_sha256=file_sha256(weights), precision=options.precision, quiet=True,
        )  # fmt: skip
        evaluator(images(min(1024, options.training), 1))  # extracts the reference and warms up
        samples = list(images(options.training, 2))
        synchronize(device)
        started = time.monotonic()
        result = evaluator(samples)
        seconds = time.monotonic() - started
    stages = {key: round(value, 2) for key, value in result.seconds.items()}
    print(f"training: {options.training:,} samples of 256 px, {options.precision}: {seconds:.2f} s")
    print(f"  stages {stages}\n  {result.metrics}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    computable = [name for name in METRICS if name not in ("accuracy", *PARTS)]
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--metrics", type=lambda text: text.split(","), default=computable)
    parser.add_argument("--training", type=int, nargs="?", const=5000, help="number of samples")
    parser.add_argument("--precision", default="float32", help="of Inception, for --training")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(environment(), flush=True)
    time_metrics(options, device)
    if options.training:
        time_training(options, device)


if __name__ == "__main__":
    main()
