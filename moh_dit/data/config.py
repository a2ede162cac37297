"""Settings of `moh-dit encode` and `moh-dit export`. Field docstrings are the help texts."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class EncodeConfig:
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
class ExportConfig:
    """Write images and labels as `arr_0` (uint8 NHWC) and `arr_1` (int64) of one .npz file."""

    output: str
    """File to write, ending in .npz; must not exist."""
    data: str = "digits"
    """"digits", a folder with one sub-folder for each class, tar shards, or hf:NAME."""
    image_size: int = 32
    """Side of the images in pixels."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read instead of stopping."""
    num_workers: int = 0
    """Loader processes."""
