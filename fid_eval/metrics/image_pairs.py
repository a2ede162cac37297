"""Compute PSNR, SSIM and LPIPS between originals and reconstructions, with torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices import RECONSTRUCTION_METRICS
from ..errors import EvaluationError

PAIR_METRICS = RECONSTRUCTION_METRICS[1:]
SSIM_SMALLEST = 6  # pixels; the window of 11 × 11 pixels (σ = 1.5) reflects 5 at each border


class ImagePairs:
    """Means over pairs of images of PSNR in dB, SSIM and LPIPS.

    Each metric is computed per image, over all channels of pixels in [0, 1], and averaged over
    images.

    Args:
        metrics: names out of ``PAIR_METRICS``.
        device: where to compute.
        lpips: network of two batches (B, 3, H, W) in [−1, 1]; required for "lpips".
    """

    def __init__(
        self,
        metrics: Sequence[str],
        device: torch.device,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        try:
            from torchmetrics.functional.image import (
                peak_signal_noise_ratio,
                structural_similarity_index_measure,
            )
        except ImportError:
            raise EvaluationError(
                f"{', '.join(metrics)} need torchmetrics: pip install 'moh-dit[metrics]'"
            ) from None
        self.device = device
        options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
        functions: dict[str, Callable[[Tensor, Tensor], Any]] = {
            "psnr": lambda a, b: peak_signal_noise_ratio(a, b, dim=(1, 2, 3), **options),
            "ssim": lambda a, b: structural_similarity_index_measure(a, b, **options),
        }
        if lpips is not None:
            functions["lpips"] = lambda a, b: lpips(2 * a - 1, 2 * b - 1)
        self.functions = {name: functions[name] for name in metrics}
        self.values: dict[str, list[Tensor]] = {name: [] for name in metrics}

    @torch.inference_mode()
    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add pairs of images, both uint8 (B, 3, H, W)."""
        if originals.shape != reconstructions.shape:
            raise EvaluationError(
                f"images of shape {tuple(originals.shape[1:])} and reconstructions of shape "
                f"{tuple(reconstructions.shape[1:])}; use --resize, or sets of one size"
            )
        if "ssim" in self.functions and min(originals.shape[2:]) < SSIM_SMALLEST:
            raise EvaluationError(
                f"SSIM needs images of at least {SSIM_SMALLEST} pixels, not "
                f"{originals.shape[3]}×{originals.shape[2]}; leave out ssim"
            )
        a, b = (x.to(self.device).float() / 255 for x in (originals, reconstructions))
        for name, function in self.functions.items():
            self.values[name].append(function(a, b).reshape(len(a)).double().cpu())

    def means(self) -> tuple[dict[str, float], int]:
        """Return the mean of each metric, and how many pairs are identical.

        The PSNR of identical images is infinite. It is the mean over the other pairs, and infinity
        if there are none.
        """
        joined = {name: torch.cat(parts) for name, parts in self.values.items()}
        identical = 0
        if "psnr" in joined:
            finite = joined["psnr"].isfinite()
            identical = int((~finite).sum())
            if finite.any():
                joined["psnr"] = joined["psnr"][finite]
        return {name: float(values.mean()) for name, values in joined.items()}, identical
