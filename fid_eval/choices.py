"""Define names and choices that the command line offers.

This module imports no torch, so that ``--help`` and parsing are fast.
"""

from collections.abc import Sequence
from typing import Literal

from .errors import EvaluationError, nearest_name

DistancePrecision = Literal["fp32", "adm-fp16"]
NetworkPrecision = Literal["float32", "tf32", "bf16"]
ReferenceKind = Literal["auto", "statistics", "images"]

DEFAULT_METRICS = ("fid", "sfid", "is", "precision", "recall")
METRIC_NAMES = (  # keys of metric_registry.METRICS, and fdr6
    *DEFAULT_METRICS, "kid", "mind", "fid_infinity", "density", "coverage", "class_fid",
    "memorised", "accuracy", "fd_dinov2", "kd_dinov2", "cmmd", "fdr6", "fd_inception",
    "fd_r6_convnext", "fd_r6_dinov2", "fd_r6_mae", "fd_r6_siglip", "fd_r6_clip",
)  # fmt: skip
RECONSTRUCTION_METRICS = ("rfid", "psnr", "ssim", "lpips")
LpipsBackbone = Literal["vgg", "alex"]
EXTRACTOR_NAMES = (  # keys of networks.extractors.EXTRACTORS
    "inception", "digits", "classifier", "vgg16", "dinov2", "dinov2-vit-s-14", "dinov2-vit-b-14",
    "dinov2-vit-l-14", "dinov2-vit-g-14", "clip", "clip-vit-b-32", "clip-vit-l-14",
    "r6-convnext", "r6-dinov2", "r6-mae", "r6-siglip", "r6-clip",
)  # fmt: skip


def check_reconstruction_metrics(names: Sequence[str]) -> list[str]:
    """Return ``names`` in the order of ``RECONSTRUCTION_METRICS``; raise for an unknown one."""
    for name in names:
        if name not in RECONSTRUCTION_METRICS:
            raise EvaluationError(
                f"metric {name!r} is unknown; {nearest_name(name, RECONSTRUCTION_METRICS)} "
                f"Metrics: {', '.join(RECONSTRUCTION_METRICS)}"
            )
    return [name for name in RECONSTRUCTION_METRICS if name in names]
