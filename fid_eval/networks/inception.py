"""Build the 2015 Inception-v3 of ADM's evaluator with pooled features, spatial features, logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

from .weight_files import save_to_buffer

SPATIAL_CHANNELS = 7  # first of the 192 channels of mixed_6/conv (Nash et al. 2021)


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (B, 3, H, W) to float32 (B, 3, size, size) as TensorFlow 1 does, bilinearly.

    Pixel i of the result is read at i · H/size, without half-pixel centres. The result is
    bit-identical to that of torch-fidelity's function, which is slower, and in channels-last
    memory format.
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


def has_cudnn(x: Tensor) -> bool:
    """Return whether cuDNN can process ``x``. AMD GPUs are "cuda" devices without cuDNN."""
    return x.is_cuda and torch.version.cuda is not None and torch.backends.cudnn.enabled


class FusedConv(nn.Module):
    """Convolution, batch normalization and ReLU; on an NVIDIA GPU one fused cuDNN kernel.

    Fusion reads and writes activations once instead of three times (``benchmarks/evaluation.py``,
    section "network").
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not has_cudnn(x) or torch.compiler.is_compiling():
            # torch.compile fuses these operations itself.
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
        """Fold the normalization into weight and bias; compute in float64 and round once."""
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bias = bn.bias.double() - bn.running_mean.double() * scale
        weight = self.conv.weight.double() * scale.view(-1, 1, 1, 1)
        return weight.float().contiguous(memory_format=torch.channels_last), bias.float()


class Inception(nn.Module):
    """torch-fidelity's network, with weights converted from TensorFlow and ADM's outputs.

    pool (B, 2048) is the mean of the last feature map. spatial (B, 2023) are the first 7 channels
    of mixed_6/conv (Mixed_6d.branch1x1 in torch-fidelity, after its ReLU), 17 × 17 × 7 in
    channels-last order. logits (B, 1008) are pool · Wᵀ without bias.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        weights = save_to_buffer(state)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
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
        convolution = type(net.Conv2d_1a_3x3)  # with children conv and bn
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, convolution):
                    setattr(module, name, FusedConv(child.conv, child.bn))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute pool (B, 2048) and spatial (B, 2023) from uint8 (B, 3, H, W)."""
        x = (resize_like_tensorflow(images, self.size) - 128) / 128
        x = self.stem(x)  # (B, 768, 17, 17)
        # self.middle computes this branch again, which takes 1 % of the time.
        spatial = self.middle.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.top(self.middle(x)).flatten(1)
        return {"pool": x, "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}

    def logits(self, pool: Tensor) -> Tensor:
        """Compute class logits (B, 1008) from pool (B, 2048)."""
        return pool @ self.fc.weight.T
