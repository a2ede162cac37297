"""Compute DINOv2's class token of 224 × 224 images, preprocessed as in torch-fidelity."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from .inception import resize_like_tensorflow

REPOSITORY = "facebookresearch/dinov2"
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class DINOv2(nn.Module):
    """A network of the published repository, loaded with torch.hub.

    Unlike torch-fidelity's extractor, it accepts local weights and prefers a local copy of the
    repository in the folder of torch.hub.

    Args:
        architecture: dinov2_vitl14, …
        state: weights; None for the published weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: str, state: dict[str, Tensor] | None) -> None:
        super().__init__()
        local = Path(torch.hub.get_dir()) / (REPOSITORY.replace("/", "_") + "_main")
        repository, source = (str(local), "local") if local.is_dir() else (REPOSITORY, "github")
        try:
            model = torch.hub.load(
                repository, architecture, source=source, pretrained=state is None
            )
        except Exception as error:
            raise EvaluationError(
                f"cannot load DINOv2 ({error}). Without a network, copy a clone of "
                f"github.com/{REPOSITORY} to {local} and give the weights with --weights"
            ) from None
        if state is not None:
            model.load_state_dict(state)
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(DEVIATION).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, d) from uint8 (B, 3, H, W)."""
        return self.model((resize_like_tensorflow(images, 224) - self.mean) / self.std)
