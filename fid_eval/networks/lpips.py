"""Build the network of LPIPS (Zhang et al. 2018) from torchmetrics.

torchmetrics contains the weights of the linear layers. The backbone has torchvision's weights.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..sets.hashing import file_sha256
from .weight_files import fetch_weights, identify_weights, load_state

# First digits of the SHA-256 of torchvision's weights, and their file.
BACKBONES = {
    "vgg": ("397923af", "vgg16-397923af.pth"),
    "alex": ("7be5be79", "alexnet-owt-7be5be79.pth"),
}
BACKBONE_URL = "https://download.pytorch.org/models/"


def load_lpips(
    backbone: str = "vgg", weights: Path | None = None, sha256: str | None = None
) -> tuple[nn.Module, str]:
    """Return the network of LPIPS and the SHA-256 of its backbone's weights.

    The network returns (B, 1, 1, 1) for two batches of images, float32 (B, 3, H, W) in [−1, 1]. It
    has no trainable parameters. Gradients flow to its inputs.

    Args:
        backbone: "vgg" or "alex".
        weights: torchvision's weights of the backbone; None for the published file.
        sha256: SHA-256 that permits other weights than the published ones.

    Raises:
        EvaluationError: unknown backbone, torchmetrics is not installed, or wrong weights.
    """
    if backbone not in BACKBONES:
        raise EvaluationError(f"LPIPS with {backbone!r}: choose one of {', '.join(BACKBONES)}")
    published, file = BACKBONES[backbone]
    identity, _ = identify_weights(weights, published, sha256)
    path = fetch_weights(weights, BACKBONE_URL + file, published, identity)
    state = load_state(path)
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        net = _LPIPS(net=backbone, pnet_rand=True)  # type: ignore[arg-type]
    except ImportError:
        raise EvaluationError(
            "LPIPS needs torchmetrics: pip install 'moh-dit[metrics]', or leave out lpips"
        ) from None
    _load_backbone(net.net, state, path)
    return net.eval().requires_grad_(False), file_sha256(path)


def _load_backbone(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load torchvision's ``features.INDEX.…`` into torchmetrics' ``sliceN.INDEX.…``."""
    with torch.no_grad():
        for name, value in backbone.state_dict().items():
            stored = state.get(f"features.{name.partition('.')[2]}")
            if stored is None or stored.shape != value.shape:
                raise EvaluationError(f"{path}: holds no weights for the backbone of LPIPS")
            value.copy_(stored)
