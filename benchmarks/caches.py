"""Measure the speed of each cache across steps, and its cost in Fréchet distance.

    python benchmarks/caches.py --run RUN --reference IMAGES [--count 5000] [--json caches.json]

Samples the same images of a trained model with each setting and prints images/s (with decoding,
without the first batch), the speed over exact sampling, the Fréchet distance to the reference, and
the mean difference of pixel values from the exact images (0 … 255).
"""

import argparse
import time

import numpy as np
from common import environment, table, write_json

from fid_eval import evaluate
from moh_dit.sampling.config import SampleConfig
from moh_dit.sampling.engine import generate
from moh_dit.sampling.sample import load_for_sampling, start_processes
from moh_dit.sampling.sample_set import set_labels

SETTINGS = [
    {},
    *(dict(cache="first-block", cache_threshold=value) for value in (0.02, 0.05, 0.1, 0.2)),
    *(dict(cache="taylorseer", cache_interval=value) for value in (2, 3, 5)),
    *(dict(cache="magcache", cache_threshold=value) for value in (0.02, 0.06, 0.12)),
]


def sample(pipeline, config):
    """Return the images of a set and the rate, without the first batch."""
    classes = range(pipeline.transformer.config.num_classes)
    labels = set_labels(config.num_samples, classes, "balanced", config.seed)
    batches = generate(pipeline, labels.tolist(), config, batch_size=config.batch_size)
    images, began = [next(batches)[1]], time.perf_counter()
    images += [batch for _, batch in batches]
    rate = (len(labels) - len(images[0])) / (time.perf_counter() - began)
    return np.concatenate(images), rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="trained run or checkpoint")
    parser.add_argument("--reference", required=True, help="images to compare with")
    parser.add_argument("--extractor", default="inception", help="feature extractor of fid-eval")
    parser.add_argument("--weights", help="weights of the feature extractor")
    parser.add_argument("--count", type=int, default=5000, help="images per setting")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--json")
    args = parser.parse_args()
    print(environment())
    rows, exact = [], None
    for setting in SETTINGS:
        config = SampleConfig(
            checkpoint=args.run, output="unused.npz", num_samples=args.count,
            batch_size=args.batch, num_inference_steps=args.steps, scheduler=args.scheduler,
            guidance_scale=args.guidance_scale, dtype="bfloat16", decode_dtype="bfloat16",
            **setting,
        )  # fmt: skip
        config.check()
        device = start_processes(config.device).device
        pipeline = load_for_sampling(config, device, config.checkpoint, config.weights)
        images, rate = sample(pipeline, config)
        exact = images.astype(np.int16) if exact is None else exact
        result = evaluate(args.reference, images, extractor=args.extractor, metrics=["fid"],
                          weights=args.weights, quiet=True)  # fmt: skip
        (name, distance), *_ = result.metrics.items()
        difference = float(np.abs(images - exact).mean())
        rows.append(
            dict(cache=" ".join(map(str, setting.values())) or "exact", steps=args.steps,
                 images_per_s=rate, pixels=difference)
            | {name: float(distance)}
        )  # fmt: skip
        rows[-1]["over exact"] = rate / rows[0]["images_per_s"]
        table(rows[-1:], list(rows[-1]))
        write_json(args.json, rows)
    table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
