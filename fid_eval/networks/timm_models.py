"""Compute features with networks of timm, preprocessed as for FDr6 (arXiv 2604.28190).

Images are scaled to [0, 1], resized with an antialiased bicubic filter, and normalized with the
mean and deviation that the network was trained with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EvaluationError

WEIGHTS_FILE = "model.safetensors"
POOLING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "class token": lambda model, features: features[:, 0],
    "attention pooling": lambda model, features: model.forward_head(features, pre_logits=True),
    "spatial mean": lambda model, features: features.mean((2, 3)),
}


@dataclass(frozen=True)
class TimmModel:
    """Name in timm, size of images in pixels, and a key of ``POOLING``."""

    name: str
    size: int
    pooling: str


MODELS = {
    "r6-convnext": TimmModel("convnextv2_base.fcmae_ft_in22k_in1k", 224, "spatial mean"),
    # 256 pixels are not a multiple of the patch size 14, hence dynamic_img_pad.
    "r6-dinov2": TimmModel("vit_large_patch14_dinov2.lvd142m", 256, "class token"),
    "r6-mae": TimmModel("vit_large_patch16_224.mae", 224, "class token"),
    "r6-siglip": TimmModel("vit_so400m_patch16_siglip_256.v2_webli", 224, "attention pooling"),
    "r6-clip": TimmModel("vit_large_patch14_clip_224.openai", 256, "class token"),
}


def import_timm() -> Any:
    """Import timm; raise if it is not installed."""
    try:
        import timm
    except ImportError:
        raise EvaluationError(
            "the networks of FDr6 need timm: pip install 'moh-dit[metrics]'"
        ) from None
    return timm


def published_weights(model: TimmModel) -> Path:
    """Return the path of the published weights on the Hugging Face hub; download them if missing.

    Raises:
        EvaluationError: the weights are not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    hub_id = import_timm().get_pretrained_cfg(model.name).hf_hub_id
    try:
        return Path(hf_hub_download(hub_id, WEIGHTS_FILE))
    except Exception as error:  # huggingface_hub raises many types
        reason = " ".join(str(error).split())
        raise EvaluationError(
            f"cannot download {WEIGHTS_FILE} of {hub_id} from the Hugging Face hub ({reason}). "
            "Without a network, download it elsewhere and give its path with --weights NAME=PATH"
        ) from None


class TimmFeatures(nn.Module):
    """A network of timm with its preprocessing.

    Args:
        model: the network and its pooling.
        state: its weights, as published by timm or by the authors.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: TimmModel, state: dict[str, Tensor]) -> None:
        super().__init__()
        timm = import_timm()
        self.size, self.pool = model.size, POOLING[model.pooling]
        options = {"dynamic_img_size": True, "dynamic_img_pad": True}
        if model.pooling == "spatial mean":  # Convolutional networks take any size.
            options = {}
        config = timm.get_pretrained_cfg(model.name)
        try:
            self.net = timm.create_model(
                model.name,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": state},
                # The published head, although unused: timm accepts any names for another head.
                num_classes=config.num_classes,
                **options,
            )
        except RuntimeError as error:  # load_state_dict lists all names that differ
            reason = " ".join(str(error).split())[:300]
            raise EvaluationError(f"the weights are not those of {model.name}: {reason}") from None
        for name, values in (("mean", config.mean), ("deviation", config.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (B, d) from uint8 (B, 3, H, W)."""
        x = images.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        x = (x - self.mean) / self.deviation
        return self.pool(self.net, self.net.forward_features(x))
