"""Check which metrics can be computed for given sets, and warn about departures from papers."""

from collections.abc import Sequence

from .errors import EvaluationError, nearest_name
from .metric_registry import METRICS
from .networks.extractors import Extractor
from .sets.image_set import STATISTICS_OF_LAYER, ImageSet

# Numbers of images in published results that use ADM's evaluator.
PUBLISHED_SAMPLES, PUBLISHED_REFERENCE = 50_000, 10_000


def check_metrics(names: Sequence[str]) -> list[str]:
    """Return ``names`` without duplicates; raise for an unknown metric."""
    for name in names:
        if name not in METRICS:
            raise EvaluationError(
                f"metric {name!r} is unknown; {nearest_name(name, METRICS)} Metrics: "
                + ", ".join(METRICS)
            )
    return list(dict.fromkeys(names))


def check_count(opened: ImageSet, k: int | None) -> None:
    """Raise if a set has fewer than 2 images, or too few for k nearest neighbours each."""
    count = opened.count
    if (opened.statistics and opened.images is None) or count is None:
        return
    if count < 2:
        raise EvaluationError(
            f"{opened.name}: holds {count} image; at least 2 are needed, papers use 50,000"
        )
    if k is not None and count < k + 1:
        raise EvaluationError(
            f"{opened.name}: holds {count} images, but precision and recall use the {k} nearest "
            f"neighbours of each image; at least {k + 1} images are needed"
        )


def missing_input(opened: ImageSet, need: str, extractor: Extractor) -> str | None:
    """Return why a set cannot provide an input of a metric, or None if it can.

    Args:
        opened: the set.
        need: an input as in ``Metric.reference`` and ``Metric.samples``.
        extractor: the extractor of the metric.
    """
    layer = need.removeprefix("gaussian:")
    images, features = opened.images is not None, opened.features
    if layer == "spatial" and not extractor.has_spatial and "spatial" not in features:
        return f"the extractor {extractor.name} has no spatial features"
    if need.startswith("gaussian:"):
        stored = STATISTICS_OF_LAYER[layer][0] in opened.statistics
        if stored or images or layer in features:
            return None
        return f"holds neither images nor statistics of {layer} features"
    if need == "labels":
        stored = "labels" in features or getattr(opened.images, "labels", None) is not None
        if stored or opened.kind == "iterable":
            return None
        return (
            "has no labels (arr_1 of an .npz, a folder per class, .cls files of a tar, "
            "dataset.json)"
        )
    if need == "logits" and not extractor.has_logits and "logits" not in features:
        return f"the extractor {extractor.name} has no class logits"
    return None if images or "pool" in features else "holds no images or features"


def missing_metric_input(
    name: str, extractor: Extractor, reference: ImageSet, samples: ImageSet
) -> str | None:
    """Return why a metric cannot be computed for two sets, or None if it can."""
    if name == "accuracy" and not extractor.knows_labels:
        return f"the classes of the extractor {extractor.name} are not the labels of the data"
    metric = METRICS[name]
    for side, opened in (("reference", reference), ("samples", samples)):
        for need in sorted(getattr(metric, side)):
            if reason := missing_input(opened, need, extractor):
                return f"{side} {opened.name}: {reason}"
    return None


def convention_warnings(
    names: Sequence[str], count: int, used: str, reference_images: int | None
) -> list[str]:
    """Return warnings about settings that differ from those of published results."""
    warnings = []
    if count != PUBLISHED_SAMPLES:
        warnings.append(
            f"{count:,} samples; papers use {PUBLISHED_SAMPLES:,}. Fewer samples give a higher FID"
        )
    if used != "statistics" and {"fid", "sfid"} & set(names):
        warnings.append(
            "FID and sFID use the reference's images; papers use statistics of the training set"
        )
    if {"precision", "recall"} & set(names) and reference_images != PUBLISHED_REFERENCE:
        warnings.append(
            f"precision and recall use {reference_images:,} reference images; papers use "
            f"{PUBLISHED_REFERENCE:,}"
        )
    return warnings


def identity_warnings(reference: ImageSet, samples: ImageSet, precision: str) -> list[str]:
    """Return warnings about features of unknown origin or precision, and about swapped sets."""
    warnings = []
    for opened in (reference, samples):
        stored = bool(opened.features) or bool(opened.statistics)
        if stored and opened.kind == "safetensors" and "extractor" not in opened.metadata:
            warnings.append(
                f"{opened.name} does not name the extractor of its features, so it was not checked"
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
