"""Provide random images and a small extractor for tests of ``fid_eval``."""

import numpy as np
import torch

SIDE = 8


class Projection(torch.nn.Module):
    """A user's extractor: fixed random projections of the pixels."""

    name = "projection"
    has_spatial = True

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(3 * SIDE * SIDE, 12, generator=generator) / 200)
        self.images_seen = 0

    def forward(self, images):
        self.images_seen += len(images)
        x = images.flatten(1).float() @ self.weight
        return {"pool": x, "spatial": x[:, :5] + 1}

    def logits(self, pool):
        return pool[:, :3]


def draw(count, seed):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)
    return images, generator.integers(0, 3, count)


def options(**more):
    return {"extractor": Projection(), "device": "cpu", "quiet": True, **more}


def features_of(images):
    with torch.inference_mode():
        return Projection()(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
