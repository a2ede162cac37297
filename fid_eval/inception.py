"""The 2015 Inception-v3 of ADM's evaluator, with the three outputs that its metrics read."""

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from .weight_files import repacked

SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv: Nash et al. 2021


class Inception(nn.Module):
    """torch-fidelity's network (weights converted from TensorFlow), read at ADM's layers.

    pool (B, 2048): the mean of the last map. spatial (B, 2023): the first 7 channels of
    mixed_6/conv (here Mixed_6d.branch1x1, after its ReLU), 17 × 17 × 7, channel last. logits:
    pool · Wᵀ without the bias, 1008 classes.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], repacked(state))
        self.size = net.INPUT_IMAGE_SIZE
        self.stem = nn.Sequential(
            net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.MaxPool_1,
            net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.MaxPool_2,
            net.Mixed_5b, net.Mixed_5c, net.Mixed_5d,
            net.Mixed_6a, net.Mixed_6b, net.Mixed_6c,
        )  # fmt: skip
        self.middle = net.Mixed_6d
        self.top = nn.Sequential(
            net.Mixed_6e, net.Mixed_7a, net.Mixed_7b, net.Mixed_7c, net.AvgPool
        )
        self.fc = net.fc

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) → pool (B, 2048), spatial (B, 2023)."""
        size = (self.size, self.size)
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size, align_corners=False)
        x = (x - 128) / 128
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, 768, 17, 17)
        spatial = self.middle.branch1x1(x)[:, :SPATIAL_CHANNELS]  # computed again below: 1 %
        x = self.top(self.middle(x)).flatten(1)
        return {"pool": x, "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) → (B, 1008)."""
        return pool @ self.fc.weight.T
