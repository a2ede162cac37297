"""What can be measured on which sets, and what to know about the numbers."""

from collections.abc import Sequence

from .errors import EvaluationError
from .metric_registry import METRICS
from .networks.extractors import Extractor
from .sets.image_set import ImageSet
from .text import nearest_name

PUBLISHED_SAMPLES, PUBLISHED_REFERENCE = 50_000, 10_000  # ADM's convention


def check_metrics(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in METRICS:
            raise EvaluationError(
                f"metric {name!r}: {nearest_name(name, METRICS)}; known: {', '.join(METRICS)}"
            )
    return list(dict.fromkeys(names))


def check_count(opened: ImageSet, k: int | None) -> None:
    """Raise for a set of one image, or of too few for its k nearest neighbours."""
    count = opened.images.count if opened.images is not None else None
    if "pool" in opened.features:
        count = len(opened.features["pool"])
    if (opened.statistics and opened.images is None) or count is None:
        return
    if count < 2:
        raise EvaluationError(
            f"{opened.name}: {count} image; a distribution needs at least 2, papers use 50,000"
        )
    if k is not None and count < k + 1:
        raise EvaluationError(
            f"{opened.name}: {count} images, but precision and recall look at the {k} nearest "
            f"neighbours of each: at least {k + 1} are needed"
        )


def obstacle(opened: ImageSet, need: str, extractor: Extractor) -> str | None:
    """Why a set cannot give what a metric needs, None if it can."""
    layer = need.removeprefix("gaussian:")
    images, features = opened.images is not None, opened.features
    if layer == "spatial" and not extractor.has_spatial and "spatial" not in features:
        return f"the extractor {extractor.name} has no spatial features"
    if need.startswith("gaussian:"):
        stored = {"pool": "mu", "spatial": "mu_s"}[layer] in opened.statistics
        if stored or images or layer in features:
            return None
        return f"holds neither images nor statistics of {layer} features"
    if need == "logits":
        if not extractor.has_logits and "logits" not in features:
            return f"the extractor {extractor.name} has no class logits"
        return None if images or "pool" in features else "holds no images or features"
    if need == "labels":
        if "labels" in features or opened.kind == "iterable":
            return None
        if opened.images is None or opened.images.labels is None:
            return (
                "has no labels (arr_1 of an .npz, a folder per class, .cls files of a tar, "
                "dataset.json)"
            )
        return None
    return None if images or layer in features else "holds no images or features"


def convention_warnings(
    names: Sequence[str], count: int, used: str, reference_images: int | None
) -> list[str]:
    """What to know before the numbers are put beside published ones."""
    warnings = []
    if count != PUBLISHED_SAMPLES:
        warnings.append(
            f"{count:,} samples; papers use {PUBLISHED_SAMPLES:,}, and FID rises as they get fewer"
        )
    if used != "statistics" and {"fid", "sfid"} & set(names):
        warnings.append(
            "FID and sFID are against the reference's images; papers use statistics of the whole "
            "training set"
        )
    if {"precision", "recall"} & set(names) and reference_images != PUBLISHED_REFERENCE:
        warnings.append(
            f"precision and recall are against {reference_images:,} reference images; papers use "
            f"{PUBLISHED_REFERENCE:,}"
        )
    return warnings


def identity_warnings(sets: Sequence[ImageSet], precision: str) -> list[str]:
    """Stored features whose origin the file does not tell, or tells to be of other precision."""
    warnings = []
    for opened in sets:
        stored = bool(opened.features) or bool(opened.statistics)
        if stored and opened.kind == "safetensors" and "extractor" not in opened.metadata:
            warnings.append(
                f"{opened.name} does not say which extractor made its features; taken on trust"
            )
        made = opened.metadata.get("network_precision", precision)
        if stored and made != precision:
            warnings.append(f"{opened.name} was made at {made}, this run is at {precision}")
    return warnings


def looks_swapped(reference: ImageSet, samples: ImageSet) -> bool:
    """A reference carries statistics of a training set; samples carry labels and no statistics."""
    return bool(samples.statistics) and not reference.statistics and reference.images is not None
