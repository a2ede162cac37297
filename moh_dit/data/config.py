"""Define the settings of `moh-dit encode` and `moh-dit export`.

The docstring under a field is its help text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..common import paths
from ..common.errors import UserError


@dataclass
class EncodeConfig:
    """Encode a data set into latents once."""

    output: str
    """Folder to write. It must not exist, unless resume is set."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, .zip, .npz, .tar, or a Hugging Face
    data set hf://OWNER/NAME. With ?streaming=true, images are encoded as they arrive."""
    image_size: int = 32
    """Side of the images in pixels."""
    autoencoder: str | None = None
    """"digits", "none" (pixels), a folder or a Hub id. Required for any data except the digits.
    Supported classes: docs/autoencoder.md."""
    horizontal_flip: bool = True
    """Encode the mirrored images as well."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the moments. float16 halves the files; relative rounding error 5e-4."""
    tf32: bool = False
    """Encode with TF32 on NVIDIA GPUs: faster, with relative errors of about 1e-3."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 encodes with bf16 autocast: faster on GPUs, with relative errors of about 1e-2."""
    compile: bool = False
    """Compile the encoder with torch.compile."""
    batch_size: int = 64
    """Images that are read and moved to the device at once. It does not change the latents."""
    skip_unreadable: bool = False
    """Skip images that cannot be read instead of stopping."""
    num_workers: int | None = None
    """Data-loader workers per process; for a stream, threads that decode images (default: the
    cores of the machine, divided among its processes, but at most one for every 256 images)."""
    resume: bool = False
    """Continue an unfinished encoding, or start if there is none."""
    verify: bool = False
    """Compare all files of finished latents in output with their hashes; encode nothing."""

    def check_paths(self) -> None:
        """Raise ``UserError`` if an input is missing, or the output exists without ``resume``."""
        from .latent_shards import check_latents_output

        if self.verify:
            return
        paths.require_data(self.data)
        paths.require_autoencoder(paths.choose_autoencoder(self.autoencoder, self.data))
        check_latents_output(Path(self.output), self.resume)


@dataclass
class ExportConfig:
    """Write images and labels as `arr_0` (uint8 NHWC) and `arr_1` (int64) of one .npz file."""

    data: str
    """"digits", a folder with one sub-folder for each class, .zip, .npz, .tar, or hf://OWNER/NAME."""
    output: str
    """File to write, ending in .npz. It must not exist."""
    image_size: int = 32
    """Side of the images in pixels. Use the size that the model was trained on."""
    skip_unreadable: bool = False
    """Skip images that cannot be read instead of stopping."""
    num_workers: int = 0
    """Data-loader workers."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for missing data, or if output exists or is not a .npz file."""
        paths.require_data(self.data)
        if Path(self.output).suffix != ".npz":
            raise UserError(f"output {self.output} must end in .npz")
        paths.require_new_output(Path(self.output))
