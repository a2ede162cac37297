"""Define the settings of `moh-dit autoencoder`. The docstring under a field is its help text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..common.errors import UserError
from ..common.paths import holds_files, require_autoencoder, require_data, require_new_output

LOWER_BOUNDS = {
    "num_steps": 1, "batch_size": 1, "num_held_out": 0, "num_workers": 0, "cache_images_gib": 0,
    "checkpoint_every": 1, "perceptual_weight": 0,
}  # fmt: skip


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
    resume: bool = False
    """Continue an unfinished training from its checkpoint in OUTPUT.partial, or start if there is
    none."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, or hf://OWNER/NAME."""
    image_size: int = 32
    """Side of the training images in pixels."""
    skip_unreadable: bool = False
    """Skip images that cannot be read instead of stopping."""
    init_from: str | None = None
    """Autoencoder to continue: a folder, a Hub id or "digits". It replaces `autoencoder`. Give a
    small `learning_rate`, such as 1e-5."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of a new autoencoder."""
    reconstruction: Literal["l1", "mse"] = "mse"
    """Distance between image and reconstruction, averaged over pixels (range −1 … 1)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance LPIPS, which keeps texture sharp: 0.1 with mse, 1 with l1.
    It needs pip install "moh-dit[metrics]"."""
    perceptual_weights: str | None = None
    """File with torchvision's weights of VGG-16, vgg16-397923af.pth (default: download it)."""
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
    """Data-loader workers per process, which decode images."""
    cache_images_gib: float = 4.0
    """Decode all images at the start and keep them in memory, if they fit into this many GiB per
    process; on a GPU, in its memory if they take at most a quarter of it. 0 reads every image again
    in each epoch."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the network. bf16 uses autocast and channels-last memory; the weights, the
    posterior and the loss stay float32. Use it on GPUs."""
    allow_tf32: bool | None = None
    """Allow TF32 in float32 matrix products and convolutions on CUDA; null allows it in
    convolutions only, the default of torch."""
    compile: bool = False
    """Compile encoder and decoder with torch.compile."""
    checkpoint_every: int = 1000
    """Steps between checkpoints in OUTPUT.partial, which is removed at the end. A checkpoint
    replaces the previous one."""
    seed: int = 0
    """Seed of the initial weights, the order of images, the flips and the posterior samples."""

    @property
    def partial(self) -> Path:
        """Folder of the checkpoints of an unfinished training, beside the output."""
        output = Path(self.output)
        return output.with_name(f"{output.name}.partial")

    def check_paths(self) -> None:
        """Raise ``UserError`` if an input is missing, or the output exists.

        Checkpoints of an unfinished training are an error without ``resume``.
        """
        require_data(self.data)
        if self.init_from is not None:
            require_autoencoder(self.init_from)
        weights = self.perceptual_weights
        if weights is not None and not Path(weights).expanduser().is_file():
            raise UserError(f"perceptual_weights {weights}: no such file")
        output = Path(self.output)
        if self.resume and output.exists():
            raise UserError(f"output {output} is already finished: give another name")
        require_new_output(output)
        if holds_files(self.partial) and not self.resume:
            raise UserError(
                f"{self.partial} is an unfinished training: continue it with --resume, give "
                "another output, or remove it"
            )

    def check_values(self, num_processes: int) -> None:
        """Raise ``UserError`` for numbers that are out of range or cannot be divided."""
        for key, least in LOWER_BOUNDS.items():
            if not getattr(self, key) >= least:
                raise UserError(f"{key} is {getattr(self, key)}: it must be at least {least}")
        if self.perceptual_weight and self.image_size < 16:
            raise UserError(
                f"image_size is {self.image_size}: perceptual_weight needs at least 16 pixels"
            )
        if self.batch_size % num_processes:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by the number of processes, "
                f"{num_processes}"
            )
