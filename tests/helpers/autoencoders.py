"""A tiny random autoencoder of each supported class, and its normalisation written out."""

from typing import Any, NamedTuple

import diffusers
import torch

from moh_dit.autoencoder.pixel_autoencoder import PixelAutoencoder

BLOCKS = dict(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    layers_per_block=1,
)


class Case(NamedTuple):
    """An autoencoder for images of 32 px."""

    class_name: str
    options: dict[str, Any]
    channels: int
    factor: int
    posterior: bool = True


CASES = {
    "one_channel": Case(
        "AutoencoderKL",
        BLOCKS | dict(latent_channels=1, scaling_factor=0.5, shift_factor=0.2), 1, 2,
    ),
    "statistics": Case(
        "AutoencoderKL",
        BLOCKS | dict(latent_channels=2, scaling_factor=0.5, latents_mean=[0.1, -0.2],
                      latents_std=[0.5, 2.0]), 2, 2,
    ),
    "rae": Case(
        "AutoencoderRAE",
        dict(encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14,
             encoder_input_size=28, patch_size=16, decoder_hidden_size=32,
             decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
             decoder_intermediate_size=32, latents_mean=[[[0.5]]] * 64,
             latents_std=[[[2.0]]] * 64, scaling_factor=0.5), 64, 16, False,
    ),
    "flux2": Case("AutoencoderKLFlux2", BLOCKS | dict(latent_channels=2), 8, 4),
    "qwen": Case(
        "AutoencoderKLQwenImage",
        dict(base_dim=8, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
             latents_mean=[0.5, -0.5], latents_std=[2.0, 3.0]), 2, 2,
    ),
    "dc": Case(
        "AutoencoderDC",
        dict(latent_channels=4, attention_head_dim=8, encoder_block_out_channels=(8, 8, 8),
             decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1, 1, 1),
             decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
             decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4), 4, 4, False,
    ),
    "tiny": Case(
        "AutoencoderTiny",
        dict(latent_channels=3, encoder_block_out_channels=(8, 8),
             decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
             num_decoder_blocks=(1, 1), scaling_factor=0.7, shift_factor=0.1), 3, 2, False,
    ),
    "pixels": Case("PixelAutoencoder", {}, 3, 1, False),
}  # fmt: skip


def make_autoencoder(name):
    torch.manual_seed(0)
    case = CASES[name]
    kind = getattr(diffusers, case.class_name, PixelAutoencoder)
    vae = kind(**case.options).eval()
    if name == "flux2":  # statistics of a trained batch norm
        vae.bn.running_mean.uniform_(-1, 1)
        vae.bn.running_var.uniform_(0.5, 2)
    return vae


@torch.no_grad()
def expected_latents(name, vae, images):
    """Encode images in −1 … 1 as the class's own pipeline does; the mean of a posterior."""
    config = vae.config
    if name == "rae":  # takes images in 0 … 1 and normalises inside `encode`
        return vae.encode((images + 1) / 2).latent
    if name == "qwen":  # QwenImageImg2ImgPipeline
        mean = torch.tensor(config.latents_mean).view(1, 2, 1, 1, 1)
        std = torch.tensor(config.latents_std).view(1, 2, 1, 1, 1)
        return ((vae.encode(images[:, :, None]).latent_dist.mode() - mean) / std)[:, :, 0]
    if name == "flux2":  # Flux2Pipeline
        pipeline = diffusers.Flux2Pipeline
        latents = pipeline._patchify_latents(vae.encode(images).latent_dist.mode())
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return (latents - vae.bn.running_mean.view(1, -1, 1, 1)) / std
    if name == "one_channel":  # StableDiffusion3Img2ImgPipeline
        latents = vae.encode(images).latent_dist.mode()
        return (latents - config.shift_factor) * config.scaling_factor
    if name == "statistics":  # StableDiffusionXLImg2ImgPipeline
        mean = torch.tensor(config.latents_mean).view(1, 2, 1, 1)
        std = torch.tensor(config.latents_std).view(1, 2, 1, 1)
        return (vae.encode(images).latent_dist.mode() - mean) * config.scaling_factor / std
    if name == "dc":  # documentation of `scaling_factor`
        return vae.encode(images).latent * config.scaling_factor
    if name == "tiny":
        return (vae.encode(images).latents - config.shift_factor) * config.scaling_factor
    return images


@torch.no_grad()
def reconstruct(name, vae, images):
    """Encode and decode images in −1 … 1 by the class alone, without normalisation."""
    if name == "rae":
        return vae.decode(vae.encode((images + 1) / 2).latent).sample * 2 - 1
    if name == "qwen":
        return vae.decode(vae.encode(images[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    encoded = vae.encode(images, return_dict=False)[0]
    return vae.decode(encoded if torch.is_tensor(encoded) else encoded.mode()).sample
