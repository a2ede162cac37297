"""Load the perceptual distance LPIPS for the loss of an autoencoder."""

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from ..common.distributed import run_on_main_process
from ..data.image_sources import user_errors
from .autoencoder_config import AutoencoderTrainingConfig


class PerceptualLoss:
    """LPIPS with VGG-16 (Zhang et al. 2018, arXiv 1801.03924), averaged over a batch.

    Args:
        config: settings with ``perceptual_weights`` and ``compile``.
        accelerator: chooses device and precision. Rank 0 downloads the weights.

    Attributes:
        sha256: SHA-256 of the weights of VGG-16.

    Raises:
        UserError: torchmetrics is not installed, or the weights are missing or not the published
            ones.
    """

    def __init__(self, config: AutoencoderTrainingConfig, accelerator: Accelerator):
        from fid_eval.networks.lpips import load_lpips

        path = config.perceptual_weights
        weights = Path(path).expanduser() if path is not None else None

        def load() -> tuple[nn.Module, str]:
            with user_errors("perceptual_weight: "):
                return load_lpips("vgg", weights)

        run_on_main_process(accelerator, lambda: load()[1])
        network, self.sha256 = load()
        self.network = network.to(accelerator.device)
        self.accelerator = accelerator
        if config.compile:
            self.network.compile()

    def __call__(self, decoded: Tensor, images: Tensor) -> Tensor:
        """Return the mean distance of two batches, float (B, 3, H, W) in −1 … 1."""
        with self.accelerator.autocast():
            return self.network(decoded, images).float().mean()
