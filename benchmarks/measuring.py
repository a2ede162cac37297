"""Measure how files and sampling settings change the Fréchet distance, for docs/measuring.md.

    python benchmarks/measuring.py --run runs/digits --work /tmp/measuring

Prints Fréchet distance, precision and recall for changed files (JPEG, resizing, number of images)
and, with --run, for samples with one setting changed at a time. The digits extractor is used (64
features, ``fd_digits``).
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fid_eval import evaluate
from moh_dit.data.images import load_batch, open_images
from moh_dit.sampling.config import SampleConfig
from moh_dit.sampling.sample import sample

METRICS = {"fid": "fd_digits", "precision": "precision_digits", "recall": "recall_digits"}


def row(name, reference, images):
    result = evaluate(reference, images, extractor="digits", metrics=list(METRICS), quiet=True)
    values = "  ".join(f"{result[key]:8.3f}" for key in METRICS.values())
    print(f"{name:44s}{len(images):6d}  {values}", flush=True)


def each(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def jpeg(quality):
    def through(image):
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality)
        return Image.open(file)

    return through


def resized(method):
    return lambda image: image.resize((24, 24), method).resize((32, 32), method)


def files(digits):
    """Compare half of the digits with the other half, which is changed a little."""
    order = np.random.default_rng(0).permutation(len(digits))
    reference, other = digits[order[:898]], digits[order[898:]]
    row("the other half, as it is", reference, other)
    for count in (400, 200, 100):
        row(f"{count} of it", reference, other[:count])
    for quality in (95, 75):
        row(f"through JPEG, quality {quality}", reference, each(other, jpeg(quality)))
    for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"):
        change = resized(Image.Resampling[name])
        row(f"to 24 px and back, {name.lower()}", reference, each(other, change))
    row(
        "one grey level brighter", reference, np.clip(other.astype(int) + 1, 0, 255).astype("uint8")
    )


def samples(digits, run, work, count):
    """Compare samples with all digits; each row changes one setting of sampling."""
    base = dict(guidance_scale=1.5, num_inference_steps=25)
    changes = [
        ("guidance 1.5, 25 steps of ddpm, seed 0", {}),
        ("seed 1", dict(seed=1)),
        ("no guidance", dict(guidance_scale=1.0)),
        ("guidance 4", dict(guidance_scale=4.0)),
        ("guidance of 3 of 4 channels", dict(guidance_channels=3)),
        ("raw weights", dict(weights="raw")),
        ("10 steps", dict(num_inference_steps=10)),
        ("ddim, 10 steps", dict(scheduler="ddim", num_inference_steps=10)),
        ("dpmsolver++, 10 steps", dict(scheduler="dpmsolver++", num_inference_steps=10)),
        ("half as many samples", dict(num_samples=count // 2)),
        ("seed 2", dict(seed=2)),
        ("ddim", dict(scheduler="ddim")),
        ("50 steps", dict(num_inference_steps=50)),
    ]
    for i, (name, change) in enumerate(changes):
        output = work / f"{i}.npz"
        if not output.exists():
            settings = {"num_samples": count, **base, **change}
            sample(SampleConfig(checkpoint=str(run), output=str(output), **settings))
        with np.load(output) as file:
            row(name, digits, file["arr_0"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="trained run of the digits (default: files only)")
    parser.add_argument(
        "--work", type=Path, default=Path("measuring"), help="folder for the samples"
    )
    parser.add_argument("--count", type=int, default=1000, help="number of samples per set")
    arguments = parser.parse_args()
    images = open_images("digits", 32)
    digits = load_batch(images, range(len(images)))[0]
    print(f"{torch.__version__}, {len(digits)} digits")
    files(digits)
    if arguments.run:
        arguments.work.mkdir(parents=True, exist_ok=True)
        samples(digits, arguments.run, arguments.work, arguments.count)


if __name__ == "__main__":
    main()
