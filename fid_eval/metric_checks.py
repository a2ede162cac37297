"""Check which metrics can be computed for given sets."""

from collections.abc import Sequence

from .errors import EvaluationError, nearest_name
from .fdr6 import FDR6, PARTS
from .metric_registry import METRICS
from .networks.extractors import Extractor
from .sets.image_set import STATISTICS_OF_LAYER, ImageSet


def check_metrics(names: Sequence[str]) -> list[str]:
    """Return ``names`` without duplicates, ``fdr6`` replaced by its six distances.

    Raises:
        EvaluationError: a metric is unknown.
    """
    known = (*METRICS, FDR6)
    for name in names:
        if name not in known:
            raise EvaluationError(
                f"metric {name!r} is unknown; {nearest_name(name, known)} Metrics: "
                + ", ".join(known)
            )
    expanded = [part for name in names for part in (PARTS if name == FDR6 else (name,))]
    return list(dict.fromkeys(expanded))


def check_count(opened: ImageSet) -> None:
    """Raise if a set has fewer than 2 images and no statistics."""
    if opened.count is not None and opened.count < 2 and not opened.statistics:
        raise EvaluationError(
            f"{opened.name}: holds {opened.count} image; at least 2 are needed, papers use 50,000"
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
    name: str, extractor: Extractor, reference: ImageSet, samples: ImageSet, k: int
) -> str | None:
    """Return why a metric cannot be computed for two sets, or None if it can.

    Args:
        name: the metric.
        extractor: its extractor.
        reference: the reference.
        samples: the sample set.
        k: nearest neighbours that precision and recall use.
    """
    if name == "accuracy" and not extractor.knows_labels:
        return f"the classes of the extractor {extractor.name} are not the labels of the data"
    metric = METRICS[name]
    for side, opened in (("reference", reference), ("samples", samples)):
        for need in sorted(getattr(metric, side)):
            if reason := missing_input(opened, need, extractor):
                return f"{side} {opened.name}: {reason}"
        if metric.neighbours and opened.count is not None and opened.count <= k:
            return (
                f"{side} {opened.name}: holds {opened.count} images; at least {k + 1} are needed "
                f"for the {k} nearest neighbours of each image"
            )
    return None
