"""Convert pixels to and from the model's range."""

import numpy as np
import torch
from torch import Tensor


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 (B, H, W, 3) in 0 … 255 to float32 (B, 3, H, W) in −1 … 1."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    return pixels / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Convert float (B, 3, H, W) in −1 … 1 to uint8 (B, H, W, 3) on the CPU; clip and round."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
