"""Latents of a data set: the right moments for every image, flipped or not."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader

from moh_dit.autoencoder import encode_moments
from moh_dit.data.images import load_batch, open_images, to_float
from moh_dit.data.latents import LatentMoments, encode_images
from moh_dit.errors import UserError


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(13):
        path = root / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return open_images(root, 8, progress=False)


@pytest.mark.parametrize("flip", [False, True])
def test_moments_of_every_image(vae, images, flip):
    latents = encode_images(images, vae, flip=flip, batch_size=5, progress=False)
    assert isinstance(latents, LatentMoments)
    assert latents.flipped is flip
    assert latents.class_names == ["a", "b", "c"]
    pixels = to_float(load_batch(images, range(len(images)))[0])
    torch.testing.assert_close(latents.moments[0], encode_moments(vae, pixels))
    if flip:
        mirrored = encode_moments(vae, torch.flip(pixels, dims=[3]))
        torch.testing.assert_close(latents.moments[1], mirrored)


def test_batches_through_a_loader(vae, images):
    latents = encode_images(images, vae, flip=True, progress=False)
    order = [[(3, True), (12, False), (3, False)], [(0, True)]]
    batches = list(DataLoader(latents, batch_sampler=order, collate_fn=lambda batch: batch))
    for (moments, labels), items in zip(batches, order, strict=True):
        for row, (index, flip) in enumerate(items):
            one, label = latents[index, flip]
            torch.testing.assert_close(moments[row], one)
            torch.testing.assert_close(one, latents.moments[int(flip), index])
            assert labels[row] == label == images.labels[index]
        assert moments.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_size_must_divide(vae):
    with pytest.raises(UserError, match="31 is not divisible"):
        encode_images(open_images("digits", 31), vae)
