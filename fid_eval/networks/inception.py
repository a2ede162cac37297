"""The 2015 Inception-v3 of ADM's evaluator, with the three outputs that its metrics read."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight_files import repacked


def torch_fidelity_module(name: str) -> ModuleType:
    """``torch_fidelity.NAME`` alone: with the package comes torchvision, which takes seconds."""
    spec = find_spec("torch_fidelity")
    if "torch_fidelity" in sys.modules or spec is None:
        return importlib.import_module(f"torch_fidelity.{name}")
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        del sys.modules["torch_fidelity"]  # whoever wants all of it imports it


fidelity = torch_fidelity_module("feature_extractor_inceptionv3")

SPATIAL_CHANNELS = 7  # of the 192 of mixed_6/conv: Nash et al. 2021


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: uint8 (B, 3, H, W) → float32 (B, 3, size, size).

    Pixel i of the result is read at i · H/size, without half-pixel centres. The same bits as
    torch-fidelity's function, which interpolates every row twice. Channels last.
    """
    rows = images.permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)
    for dim in (2, 1):
        length = rows.shape[dim]
        scale = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, dtype=torch.float32, device=images.device) * scale
        low = position.long()
        high = (low + 1).clamp_max(length - 1)
        fraction = (position - low.float()).view(-1, *[1] * (3 - dim))
        near = rows.index_select(dim, low).float()
        rows = near + (rows.index_select(dim, high).float() - near) * fraction
    return rows.permute(0, 3, 1, 2)


def fuses(x: Tensor) -> bool:
    """Whether there is a cuDNN for ``x``; AMD's GPUs are "cuda" too, and have none."""
    return x.is_cuda and torch.version.cuda is not None and torch.backends.cudnn.enabled


class FusedConv(nn.Module):
    """torch-fidelity's BasicConv2d; on an NVIDIA GPU, cuDNN also normalises and applies the ReLU.

    One pass over every activation instead of three (``benchmarks/evaluation.py``, "network").
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x) or torch.compiler.is_compiling():  # which fuses by itself
            return F.relu(self.bn(self.conv(x)), inplace=True)
        if self.folded is None or self.folded[0].device != x.device:
            self.folded = self.fold()
        weight, bias = self.folded
        if torch.is_autocast_enabled("cuda"):
            kind = torch.get_autocast_dtype("cuda")
            x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        conv = self.conv
        assert not isinstance(conv.padding, str)
        return torch.cudnn_convolution_relu(
            x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of convolution and normalisation as one, rounded once from float64."""
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bias = bn.bias.double() - bn.running_mean.double() * scale
        weight = self.conv.weight.double() * scale.view(-1, 1, 1, 1)
        return weight.float().contiguous(memory_format=torch.channels_last), bias.float()


class Inception(nn.Module):
    """torch-fidelity's network (weights converted from TensorFlow), read at ADM's layers.

    pool (B, 2048): the mean of the last map. spatial (B, 2023): the first 7 channels of
    mixed_6/conv (here Mixed_6d.branch1x1, after its ReLU), 17 × 17 × 7, channel last. logits:
    pool · Wᵀ without the bias, 1008 classes.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], repacked(state))
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
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, fidelity.BasicConv2d):
                    setattr(module, name, FusedConv(child.conv, child.bn))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) → pool (B, 2048), spatial (B, 2023)."""
        x = (resize_like_tensorflow(images, self.size) - 128) / 128
        x = self.stem(x)  # (B, 768, 17, 17)
        spatial = self.middle.branch1x1(x)[:, :SPATIAL_CHANNELS]  # computed again below: 1 %
        x = self.top(self.middle(x)).flatten(1)
        return {"pool": x, "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) → (B, 1008)."""
        return pool @ self.fc.weight.T
