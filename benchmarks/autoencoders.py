"""Measure how fast each supported autoencoder encodes and decodes, for docs/autoencoder.md.

    python benchmarks/autoencoders.py --dtype bf16 --image_size 256 --batch_size 32

Prints latent shape and images/s of encoding and decoding. Architectures are those of published
autoencoders; weights are random.
"""

import argparse
import time

import diffusers
import torch
from common import environment

from moh_dit.autoencoder import decode_latents, encode_moments, latent_shape
from moh_dit.autoencoder.pixel_autoencoder import PixelAutoencoder

FOUR_LEVELS = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
FIVE_LEVELS = dict(
    block_out_channels=(128, 128, 256, 256, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 5,
    up_block_types=("UpDecoderBlock2D",) * 5,
)
DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
ARCHITECTURES = {
    "Stable Diffusion": ("AutoencoderKL", FOUR_LEVELS),
    "FLUX.1": ("AutoencoderKL", FOUR_LEVELS | dict(latent_channels=16)),
    "VA-VAE f16d32": ("AutoencoderKL", FIVE_LEVELS | dict(latent_channels=32)),
    "FLUX.2": ("AutoencoderKLFlux2", FOUR_LEVELS),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}),
    "RAE, DINOv2-B": (
        "AutoencoderRAE",
        dict(encoder_hidden_size=768, decoder_hidden_size=1152, decoder_num_hidden_layers=28,
             decoder_intermediate_size=4096),
    ),
    "DC-AE f32c32": (
        "AutoencoderDC",
        dict(latent_channels=32, encoder_block_types=DC_BLOCKS, decoder_block_types=DC_BLOCKS),
    ),
    "TAESD": ("AutoencoderTiny", {}),
    "none": ("PixelAutoencoder", {}),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def make(name, dtype, device):
    class_name, options = ARCHITECTURES[name]
    kind = getattr(diffusers, class_name, PixelAutoencoder)
    torch.manual_seed(0)
    with torch.device(device):
        vae = kind(**options)
    return vae.to(device, dtype).eval().requires_grad_(False)


def rate(call, batch_size, seconds):
    """Return images/s; ``call`` processes ``batch_size`` images."""
    for _ in range(2):
        call()
    torch.accelerator.synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        torch.accelerator.synchronize()
        calls += 1
    return calls * batch_size / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of each measurement")
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES))
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator()
    print(environment(), f"{args.image_size} px, batch {args.batch_size}, {args.dtype}")
    for name in args.only:
        vae = make(name, DTYPES[args.dtype], device)
        shape = latent_shape(vae, args.image_size)
        size = (args.image_size, args.image_size)
        images = torch.rand(args.batch_size, 3, *size, device=device) * 2 - 1
        latents = torch.randn(args.batch_size, *shape, device=device)
        encoded = rate(lambda v=vae, i=images: encode_moments(v, i), len(images), args.seconds)
        decoded = rate(lambda v=vae, z=latents: decode_latents(v, z), len(images), args.seconds)
        row = f"{name:18s}{'×'.join(map(str, shape)):>12s}{encoded:10.0f}{decoded:10.0f}"
        print(row, flush=True)
        del vae


if __name__ == "__main__":
    main()
