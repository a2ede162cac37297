"""The commands that prepare data: what each takes. The docstring under a field is its help text."""

from dataclasses import dataclass, field
from typing import Literal

from ..cli import run_program


@dataclass
class Encoding:
    """Encode a data set once into sharded latents."""

    output: str
    """Folder to write; must not exist, unless resumed."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, hf:NAME, or
    hf-stream:NAME, which is encoded as it arrives and never stored."""
    image_size: int = 32
    """Side of the images in pixels."""
    autoencoder: str = "digits"
    """"digits", a folder or a hub id."""
    flip: bool = True
    """Encode the mirrored images too."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the moments; float16 halves the files and rounds at 5e-4 relative."""
    tf32: bool = False
    """Encode with TF32 on NVIDIA GPUs: faster, relative errors of about 1e-3."""
    batch_size: int = 64
    """Images read and moved to the device at once; has no influence on the result."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read instead of stopping."""
    num_workers: int = 0
    """Loader processes per encoding process (of a stream: threads that decode images)."""
    resume: bool = False
    """Continue an encoding that was stopped."""


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
class AutoencoderTraining:
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


def _encode(config: Encoding) -> None:
    from .encoding import encode_data  # here, so that --help stays quick

    encode_data(config)


def _train(config: AutoencoderTraining) -> None:
    from .autoencoder_training import train_autoencoder as train

    train(config)


def encode() -> None:
    """Console script ``moh-dit-encode``."""
    run_program(
        _encode,
        Encoding,
        prog="moh-dit-encode",
        description="Encode a data set once into sharded latents for training.",
        example="accelerate launch -m moh_dit.data.latents --data my_images --image_size 256 "
        "--autoencoder stabilityai/sd-vae-ft-ema --output my_latents",
    )


def train_autoencoder() -> None:
    """Console script ``moh-dit-train-autoencoder``."""
    run_program(
        _train,
        AutoencoderTraining,
        prog="moh-dit-train-autoencoder",
        description="Train an AutoencoderKL on images, measure it and write it for diffusers.",
        example="moh-dit-train-autoencoder --data my_images --image_size 64 --output my_vae",
    )
