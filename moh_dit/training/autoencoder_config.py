"""Define the settings of `moh-dit autoencoder`. The docstring under a field is its help text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..common.paths import require_autoencoder, require_data, require_new_output


@dataclass
class AutoencoderConfig:
    """Architecture of a new autoencoder; each block after the first halves the resolution."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 128, 128])
    """Width of each block. n blocks give a downsampling factor of 2^(n−1)."""
    layers_per_block: int = 1
    """Residual layers in each encoder block; a decoder block has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of the group normalisation. Each width must be a multiple of it."""
    mid_block_attention: bool = True
    """Use self-attention at the lowest resolution."""


@dataclass
class AutoencoderTrainingConfig:
    """Train an AutoencoderKL on images with a reconstruction loss and a KL loss."""

    output: str
    """Folder to write. It must not exist."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, or hf://OWNER/NAME."""
    image_size: int = 32
    """Side of the training images in pixels."""
    skip_unreadable: bool = False
    """Skip images that cannot be read instead of stopping."""
    initial: str | None = None
    """Autoencoder to start from: a folder, a Hub id or "digits". It replaces `autoencoder`."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of a new autoencoder."""
    reconstruction: Literal["l1", "mse"] = "mse"
    """Distance between image and reconstruction, averaged over pixels (range −1 … 1)."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence to N(0, 1), averaged over latent values. A larger weight gives
    latents closer to a normal distribution, and blurrier reconstructions."""
    latent_noise: float = 0.0
    """Noise added to the latents in training, in standard deviations of each channel. The decoder
    learns to tolerate small errors of the diffusion model."""
    num_steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 32
    """Images per step, summed over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, after 2 % linear warm-up and before a cosine decay to zero."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    horizontal_flip: bool = True
    """Mirror half of the training images. Turn it off for text and digits."""
    num_held_out: int = 64
    """Images kept out of training for the measurements; 0 measures on training images."""
    num_workers: int = 0
    """Data-loader workers per process."""
    seed: int = 0
    """Seed of the initial weights, the order of images, the flips and the posterior samples."""

    def check_paths(self) -> None:
        """Raise ``UserError`` if the data or ``initial`` is missing, or the output exists."""
        require_data(self.data)
        if self.initial is not None:
            require_autoencoder(self.initial)
        require_new_output(Path(self.output))
