"""Define small image classifiers, whose features replace Inception's, and load their weights.

``fid-eval classifier`` trains them (``classifier_training``). Their labels are those of the data.
"""

import json
import math
from pathlib import Path

import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import EvaluationError

METADATA = "fid_eval_classifier"  # key of the JSON in the weights file
SPATIAL_CHANNELS = 4  # of the last feature map: 4 × 8 × 8 spatial features for 128 px images
LAST_MAP = 8  # side of the last feature map of a residual network, within a factor of √2
MIN_CHANNELS = 32  # of a stage, unless the network is narrower


class Classifier(nn.Module):
    """A convolutional trunk, mean pooling and a linear head.

    Args:
        trunk: maps float (B, 3, H, W) in −1 … 1 to feature maps (B, width, H/stride, W/stride).
        stride: downsampling factor of the trunk.
        width: number of pooled features.
        classes: number of classes.
    """

    def __init__(self, trunk: nn.Module, stride: int, width: int, classes: int) -> None:
        super().__init__()
        self.trunk, self.stride = trunk, stride
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute pool (B, width) and spatial (B, SPATIAL_CHANNELS · h · w) of uint8 images."""
        maps = self.trunk(images.float() / 127.5 - 1)
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # channels last
        return {"pool": maps.mean((2, 3)), "spatial": spatial}

    def logits(self, pool: Tensor) -> Tensor:
        """Compute class logits (B, classes) from pool (B, width)."""
        return self.head(pool)

    def classify(self, images: Tensor) -> Tensor:
        """Compute class logits (B, classes) of float images (B, 3, H, W) in −1 … 1."""
        return self.head(self.trunk(images).mean((2, 3)))

    def dimensions(self, height: int, width: int) -> dict[str, int]:
        """Return the number of features of each layer for images of this size."""
        positions = math.ceil(height / self.stride) * math.ceil(width / self.stride)
        return {"pool": self.head.in_features, "spatial": SPATIAL_CHANNELS * positions}


class ConvNorm(nn.Module):
    """A convolution and a batch normalization."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs)
        nn.init.zeros_(self.second.norm.weight)  # The block starts as its shortcut.
        changes_shape = stride > 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def residual_classifier(height: int, width_px: int, width: int, classes: int) -> Classifier:
    """Create a residual network that halves the resolution until the map has about 8 × 8 positions.

    The number of channels doubles in each stage of two blocks, up to ``width``.

    Args:
        height: of the images, in pixels.
        width_px: width of the images, in pixels.
        width: number of pooled features.
        classes: number of classes.
    """
    halvings = max(1, round(math.log2(min(height, width_px) / LAST_MAP)))
    channels = [
        min(width, max(MIN_CHANNELS, width >> later)) for later in reversed(range(halvings))
    ]
    layers: list[nn.Module] = [ConvNorm(3, channels[0], stride=2), nn.ReLU()]
    for stage, outputs in enumerate(channels):
        inputs, stride = (channels[stage - 1], 2) if stage else (outputs, 1)
        layers += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs)]
    return Classifier(nn.Sequential(*layers), 2**halvings, width, classes)


def plain_classifier(width: int, classes: int) -> Classifier:
    """Create the network of version 0.1.0, of which the built-in weights for digits are."""
    plan = [(3, width // 2, 1), (width // 2, width, 2), (width, width, 1),
            (width, width, 2), (width, width, 1)]  # fmt: skip  # (in, out, stride)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in plan:
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return Classifier(nn.Sequential(*layers), 4, width, classes)


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """Load a classifier that ``fid-eval classifier`` has written, with its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA, "null"))
        if metadata is None:
            raise EvaluationError(f"{path}: not a file written by fid-eval classifier")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    width, classes = metadata["width"], metadata["classes"]
    network = metadata.get("network", "plain")
    if network == "plain":
        model = plain_classifier(width, classes)
    elif network == "residual":
        height, width_px = metadata["height_width"]
        model = residual_classifier(height, width_px, width, classes)
    else:
        raise EvaluationError(
            f"{path}: has the network {network!r}, which this version of fid-eval does not know; "
            "update moh-dit"
        )
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    _fold_normalization(model)
    return model, metadata


def _fold_normalization(module: nn.Module) -> None:
    """Fold each batch normalization of a residual network into its convolution."""
    for name, child in list(module.named_children()):
        if isinstance(child, ConvNorm):
            setattr(module, name, fuse_conv_bn_eval(child.conv, child.norm))
        else:
            _fold_normalization(child)
