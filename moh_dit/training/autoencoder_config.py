"""Settings of `moh-dit autoencoder`. The docstring under a field is its help text."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AutoencoderConfig:
    """Shape of a new autoencoder; each block after the first halves the resolution."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128, 128])
    """Width of each block; n blocks give a downsampling factor of 2^(n−1)."""
    layers_per_block: int = 1
    """Residual layers in each encoder block (the decoder has one more)."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of the group normalisation; must divide every width."""
    mid_block_attention: bool = True
    """Self-attention at the lowest resolution."""


@dataclass
class AutoencoderTrainingConfig:
    """Train an AutoencoderKL on images: reconstruction + KL."""

    output: str
    """Folder to write; must not exist."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, or hf:NAME."""
    image_size: int = 32
    """Side of the training images in pixels."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read instead of stopping."""
    initial: str | None = None
    """Start from this autoencoder (folder, hub id, "digits"); its shape replaces `autoencoder`."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Shape of a new autoencoder."""
    reconstruction: Literal["l1", "mse"] = "mse"
    """Distance between image and reconstruction, averaged over pixels (range −1 … 1)."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence to N(0, 1), averaged over latent values: more makes latents
    smoother and nearer to normal, and reconstructions softer."""
    latent_noise: float = 0.0
    """Noise added to the latents in training, relative to the standard deviation of each channel:
    teaches the decoder to forgive what a diffusion model gets slightly wrong."""
    num_steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step over all processes."""
    learning_rate: float = 1e-3
    """Peak of the AdamW learning rate: 2 % linear warm-up, then a cosine to zero."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    random_flip: bool = True
    """Mirror half of the training images; wrong for text and digits."""
    num_held_out: int = 64
    """Images kept out of training to measure on (0: measure on training images)."""
    num_workers: int = 0
    """Loader processes per training process."""
    seed: int = 0
    """Seed of weights, order, flips and posterior samples."""
