"""Describe the conditions of a measurement, and warn about departures from papers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .features import Features
from .sets.image_set import ImageSet

# Numbers of images in published results that use ADM's evaluator.
PUBLISHED_SAMPLES, PUBLISHED_REFERENCE = 50_000, 10_000


def frechet_source(opened: ImageSet, prefer_statistics: bool) -> str:
    """Return what gives a set's Fréchet distance: "statistics", "features" or "images"."""
    if opened.statistics and (prefer_statistics or opened.images is None):
        return "statistics"
    return "features" if opened.features else "images"


def describe_labels(labels: Tensor | None) -> dict[str, Any]:
    """Describe how often each label (n,) occurs; RAE's FID on ImageNet depends on it by 0.1.

    Returns:
        ``labels``: "balanced" if the counts of the classes that occur differ by at most 1, "drawn"
        if they differ more, "unknown" without labels; and the number of these ``classes``.
    """
    if labels is None:
        return {"labels": "unknown", "classes": None}
    counts = labels.unique(return_counts=True)[1]
    is_balanced = int(counts.max() - counts.min()) <= 1
    return {"labels": "balanced" if is_balanced else "drawn", "classes": len(counts)}


def describe_samples(
    opened: ImageSet, features: Features, prefer_statistics: bool
) -> dict[str, Any]:
    """Return name, hash, counts, labels, image size and conversions of a sample set."""
    labels = features.labels
    if labels is None and opened.images is not None and opened.images.labels is not None:
        labels = torch.from_numpy(opened.images.labels)
    return {
        "name": opened.name,
        "kind": opened.kind,
        "count": features.count,
        **describe_labels(labels),
        "frechet_from": frechet_source(opened, prefer_statistics),
        "statistics_count": opened.metadata.get("count"),
        "image_size": opened.image_size,
        "sha256": opened.content_hash(),
        "reading": opened.facts(),
    }


def describe_reference(opened: ImageSet, prefer_statistics: bool) -> dict[str, Any]:
    """Return name, hash and counts of a reference, and what gives its Fréchet distance."""
    return {
        "name": opened.name,
        "kind": opened.kind,
        "frechet_from": frechet_source(opened, prefer_statistics),
        "sha256": opened.content_hash(),
        "statistics_count": opened.metadata.get("count"),
        "image_count": opened.count,
        "reading": opened.facts(),
    }


def convention_warnings(
    names: Sequence[str], samples: dict[str, Any], reference: dict[str, Any]
) -> list[str]:
    """Return warnings about settings that differ from those of published results.

    Args:
        names: the metrics.
        samples: ``describe_samples``.
        reference: ``describe_reference``.
    """
    warnings = []
    from_statistics = samples["frechet_from"] == "statistics"
    count = samples["statistics_count" if from_statistics else "count"]
    used, reference_images = reference["frechet_from"], reference["image_count"]
    if count is None:
        warnings.append(
            "the samples are stored statistics of an unknown number of images; papers use "
            f"{PUBLISHED_SAMPLES:,}"
        )
    elif count != PUBLISHED_SAMPLES:
        warnings.append(
            f"{count:,} samples; papers use {PUBLISHED_SAMPLES:,}. Fewer samples give a higher FID"
        )
    if used != "statistics" and {"fid", "sfid"} & set(names):
        warnings.append(
            "FID and sFID use the reference's images; papers use statistics of the training set"
        )
    if {"precision", "recall"} & set(names) and reference_images not in (
        PUBLISHED_REFERENCE,
        None,
    ):
        warnings.append(
            f"precision and recall use {reference_images:,} reference images; papers use "
            f"{PUBLISHED_REFERENCE:,}"
        )
    return warnings


def identity_warnings(
    reference: ImageSet, samples: ImageSet, precision: str, extractors: dict[str, bool]
) -> list[str]:
    """Return warnings about features of unknown origin or precision, and about swapped sets.

    Args:
        reference: the reference.
        samples: the sample set.
        precision: precision of the network in this run.
        extractors: the extractors of this run, and whether each is the published Inception.
    """
    warnings = []
    for opened in (reference, samples):
        stored = bool(opened.features) or bool(opened.statistics)
        is_named = "extractor_name" in opened.metadata or opened.kind == "npz"  # ADM's: Inception
        is_known = "extractor" in opened.metadata or (is_named and extractors.get("inception"))
        if stored and not is_known:
            what = "record the weights" if is_named else "name the extractor"
            warnings.append(
                f"{opened.name} does not {what} of its features, which were not checked"
            )
        if (
            opened.kind == "npz"
            and not opened.metadata
            and {"mu"} == opened.statistics.keys() - {"sigma"}
        ):
            warnings.append(
                f"{opened.name} does not tell how its images were resized; TensorFlow's bilinear "
                "interpolation is assumed, as in ADM and EDM. pytorch-fid and clean-fid differ"
            )
        for name, how in opened.metadata.get("resizing", {}).items():
            if name in extractors:
                warnings.append(
                    f"{opened.name}: {opened.metadata['made_by']} resizes images with {how} for "
                    f"{name}, unlike this run"
                )
        made = opened.metadata.get("network_precision", precision)
        if stored and made != precision:
            warnings.append(
                f"{opened.name} was computed with --precision {made}, this run uses {precision}"
            )
    if samples.statistics and not reference.statistics and reference.images is not None:
        warnings.append(
            f"are the sets swapped? {samples.name} holds statistics, as references do, and "
            f"{reference.name} does not; the reference comes first"
        )
    return warnings
