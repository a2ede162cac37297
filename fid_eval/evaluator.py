"""Evaluate sample sets against a reference."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import conditions, metric_checks
from .choices import DEFAULT_METRICS, DistancePrecision, ReferenceKind
from .distributed import rank_and_world_size, run_on_rank0
from .errors import EvaluationError
from .fdr6 import FDR6, PARTS, combine, load_divisors
from .features import Features, Runtime, extract, read_ahead
from .metric_registry import METRICS, Comparison
from .networks.extractors import Extractor, get_extractor, wrap_extractor
from .references import check_reference, open_reference
from .result import Result
from .sets.decoding import Preprocess
from .sets.image_set import STATISTICS_OF_LAYER, ImageSet
from .sets.opening import open_set


class Evaluator:
    """Evaluates any number of sample sets against one reference.

    The features of the reference and the networks are kept in memory between sets.

    Args:
        reference: a path, the name of a saved reference, an array, a data set or an iterable of
            batches.
        metrics: names of metrics; by default ADM's five, or those that the reference allows.
        extractor: a name, an import path, or a module uint8 (B, 3, H, W) → (B, d).
        weights: path of the extractor's weights, or {extractor name: path}.
        weights_sha256: expected hash of the weights, or {extractor name: hash}.
        distances: for precision and recall, "adm-fp16" (default with Inception, as in papers) or
            "fp32" (default with other extractors).
        k: number of neighbours for precision and recall.
        bootstrap: number of resamples for 95 % intervals; 0 for none.
        reference_kind: compute the Fréchet distance from stored "statistics" or from "images" of
            the reference; "auto" prefers statistics.
        divisors: of FDr6: "imagenet256", or a results file of a held-out set; None for no mean.
        reference_extractor: name of the extractor of a reference file of another program that does
            not tell it.
        resize: resize images to this number of pixels, square; None keeps them.
        crop: crop the centre when resizing, instead of stretching.
        background: colour behind transparent pixels, a name or "#rrggbb".
        strict: refuse images that are not 8-bit RGB, and tars without an end mark.
        runtime: how the network runs; the arguments of ``Runtime``: device, batch_size, workers,
            precision, compile, cache and quiet.

    Raises:
        EvaluationError: a ValueError with a message that says what to change.
    """

    def __init__(
        self,
        reference: Any,
        metrics: Sequence[str] | None = None,
        extractor: Any = "inception",
        weights: str | Path | dict[str, str] | None = None,
        weights_sha256: str | dict[str, str] | None = None,
        distances: DistancePrecision | None = None,
        k: int = 3,
        bootstrap: int = 0,
        reference_kind: ReferenceKind = "auto",
        divisors: str | Path | None = None,
        reference_extractor: str | None = None,
        resize: int | None = None,
        crop: bool = False,
        background: str = "white",
        strict: bool = False,
        **runtime: Any,
    ) -> None:
        rank_and_world_size()  # Initialize the process group on all ranks together.
        self.preprocess = Preprocess(resize, crop, background, strict)
        self.explicit = metrics is not None
        self.names = metric_checks.check_metrics(metrics or DEFAULT_METRICS)
        self.runtime = Runtime(**runtime)
        self.distances, self.k, self.bootstrap = distances, k, bootstrap
        self.reference_kind = reference_kind
        self.prefer_statistics = reference_kind != "images"
        name = extractor if isinstance(extractor, str) else None
        self.weights: dict[Any, Any] = weights if isinstance(weights, dict) else {name: weights}
        hashes = weights_sha256
        self.hashes: dict[Any, Any] = hashes if isinstance(hashes, dict) else {name: hashes}
        self.default = wrap_extractor(extractor) if name is None else self._get_extractor(name)
        self.extractors: dict[str, Extractor] = {self.default.name: self.default}
        self.reference = open_reference(reference, self.preprocess, reference_extractor)
        self.divisors = load_divisors(divisors) if divisors is not None else None
        if self.divisors is not None:  # A set of a jobs file may ask for fdr6.
            self.divisors.check(*self._fdr6_keys())
        # By extractor: the inputs of metrics that the features provide, and the features.
        self._reference_features: dict[str, tuple[frozenset[str], Features]] = {}

    def _get_extractor(self, name: str) -> Extractor:
        return get_extractor(name, self.weights.get(name), self.hashes.get(name))

    def extractor_of(self, metric: str) -> Extractor:
        """Return the extractor that computes the features of a metric."""
        name = METRICS[metric].extractor
        if name is None or name == self.default.name:
            return self.default
        if name not in self.extractors:
            self.extractors[name] = self._get_extractor(name)
        return self.extractors[name]

    def _fdr6_keys(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Return the result keys of FDr6's distances, and the identities of their extractors."""
        used = {part: self.extractor_of(part) for part in PARTS}
        keys = {name: METRICS[part].key(used[part]) for part, name in PARTS.items()}
        return keys, {name: used[part].identity() for part, name in PARTS.items()}

    def load(self) -> None:
        """Download the weights and build the networks now, instead of at the first set."""
        for extractor in map(self.extractor_of, self.names):
            build = partial(extractor.load, self.runtime.device, self.runtime.compile)
            run_on_rank0(build)  # Only rank 0 downloads the weights.
            build()

    def open(self, samples: Any, name: str | None = None) -> ImageSet:
        """Open a sample set and check that the requested metrics can be computed for it."""
        opened = self._open(samples, name)
        self.select_metrics(opened, self.names, self.explicit)
        return opened

    def _open(self, samples: Any, name: str | None) -> ImageSet:
        if isinstance(samples, ImageSet):
            return samples
        opened = open_set(samples, self.preprocess, name)
        opened.number_classes_as(self.reference)
        return opened

    def select_metrics(
        self, samples: ImageSet, names: Sequence[str], explicit: bool
    ) -> tuple[list[str], list[str]]:
        """Select the metrics that can be computed for a sample set.

        Args:
            samples: the set.
            names: the metrics to select from.
            explicit: raise if one of them cannot be computed, instead of leaving it out.

        Returns:
            Names of the selected metrics, and reasons why others are left out.
        """
        possible, missing = [], []
        names = list(names)
        for opened in (self.reference, samples):
            metric_checks.check_count(opened)
        if not explicit and self.default.knows_labels:
            names.append("accuracy")
        for name in names:
            extractor = self.extractor_of(name)
            base = self.reference.for_extractor(extractor.name)
            own = samples.for_extractor(extractor.name)
            check_reference(base, own, extractor, self.preprocess)
            reason = metric_checks.missing_metric_input(name, extractor, base, own, self.k)
            if reason is None:
                possible.append(name)
            elif explicit:
                raise EvaluationError(f"{samples.name}: {name} cannot be computed: {reason}")
            elif name != "accuracy":
                missing.append(f"{name} not computed: {reason}")
        if not possible:
            raise EvaluationError(
                f"{samples.name}: no metric can be computed: {'; '.join(missing)}"
            )
        return possible, missing

    def __call__(
        self, samples: Any, name: str | None = None, metrics: Sequence[str] | None = None
    ) -> Result:
        """Evaluate one sample set.

        Args:
            samples: a path, an array, a data set or an iterable of batches.
            name: name of the set in the result.
            metrics: metrics for this set; by default those of the evaluator.
        """
        opened = self._open(samples, name)
        names = metric_checks.check_metrics(metrics) if metrics is not None else self.names
        names, missing = self.select_metrics(opened, names, metrics is not None or self.explicit)
        started = time.monotonic()
        result = Result(opened.name, {}, warnings=missing)
        groups: dict[str, list[str]] = {}
        for metric in names:
            groups.setdefault(self.extractor_of(metric).name, []).append(metric)
        described = Features(None)
        computed = 0
        seconds = 0.0
        for extractor_name, group in groups.items():
            extractor = self.extractors[extractor_name]
            distances = self.distances or ("adm-fp16" if extractor.label is None else "fp32")
            begun = time.monotonic()
            with read_ahead(opened, self.runtime):
                reference = self._features_of_reference(extractor, group)
            result.seconds[f"reference, {extractor_name}"] = time.monotonic() - begun
            own = opened.for_extractor(extractor_name)
            features = self._features(own, extractor, group, "samples")
            # The image size and labels of an iterable are known only now.
            base = self.reference.for_extractor(extractor_name)
            check_reference(base, own, extractor, self.preprocess)
            for part in (reference, features):
                result.warnings += part.notes
                part.notes.clear()  # The features of the reference are used again.
            described = described if features.count is None else features
            computed += features.computed
            seconds += features.seconds
            result.seconds[f"samples, {extractor_name}"] = features.seconds
            if run_on_rank0(lambda: features.labels is None):  # noqa: B023
                unlabelled = [m for m in group if "labels" in METRICS[m].samples]
                if unlabelled and (self.explicit or metrics is not None):
                    raise EvaluationError(
                        f"{opened.name}: {unlabelled[0]} needs batches with labels"
                    )
                group[:] = [m for m in group if m not in unlabelled]
            comparison = Comparison(
                reference,
                features,
                extractor,
                self.runtime.device,
                distances,
                self.k,
                self.bootstrap,
            )
            run_on_rank0(partial(self._compute_metrics, result, group, comparison))
        result = run_on_rank0(lambda: self._describe(result, opened, names, described))
        keys = [METRICS[metric].key(self.extractor_of(metric)) for metric in names] + [FDR6]
        result.metrics = {key: result.metrics[key] for key in keys if key in result.metrics}
        result.seconds["all"] = time.monotonic() - started
        result.samples["images_per_second"] = computed / seconds if computed else None
        return result

    def _features_of_reference(self, extractor: Extractor, group: Iterable[str]) -> Features:
        base = self.reference.for_extractor(extractor.name)
        wanted = [
            name
            for name in dict.fromkeys([*self.names, *group])
            if self.extractor_of(name) is extractor
            and all(
                metric_checks.missing_input(base, n, extractor) is None
                for n in METRICS[name].reference
            )
        ]
        needs = frozenset().union(*(METRICS[name].reference for name in wanted))
        available, features = self._reference_features.get(extractor.name, (frozenset(), None))
        if features is None or not needs <= available:
            features = self._features(base, extractor, wanted, "reference")
            self._reference_features[extractor.name] = needs, features
        return features

    def _features(
        self, opened: ImageSet, extractor: Extractor, names: Iterable[str], side: str
    ) -> Features:
        """Return the inputs of metrics from stored features or a pass over the images."""
        needs = frozenset().union(*(getattr(METRICS[name], side) for name in names))
        use_statistics = conditions.frechet_source(opened, self.prefer_statistics) == "statistics"
        arrays = opened.statistics if use_statistics else {}
        tensors = {key: torch.from_numpy(value).double() for key, value in arrays.items()}
        stored = {
            layer: (tensors[mean], tensors[covariance])
            for layer, (mean, covariance) in STATISTICS_OF_LAYER.items()
            if mean in tensors
        }
        if opened.features:
            rows = {k: v.float() for k, v in opened.features.items() if k in ("pool", "spatial")}
            labels, logits = opened.features.get("labels"), opened.features.get("logits")
            count = len(opened.features["pool"])
            return Features(count, rows, {}, stored, labels, logits)
        moments = {n.partition(":")[2] for n in needs if n.startswith("gaussian:")} - set(stored)
        keep = {"pool"} if needs & {"pool", "logits"} else set()
        if self.bootstrap:
            keep |= moments
        if not keep and not moments:
            features = Features(opened.metadata.get("count"))
        else:
            features = extract(opened, extractor, keep, moments, self.runtime)
        return replace(features, stored=stored)

    def _compute_metrics(self, result: Result, group: list[str], comparison: Comparison) -> None:
        extractor = comparison.extractor
        for name in group:
            metric = METRICS[name]
            key = metric.key(extractor)
            comparison.details, comparison.warnings, comparison.interval = {}, [], None
            started = time.monotonic()
            result.metrics[key] = metric.compute(comparison)
            result.seconds[key] = time.monotonic() - started
            result.higher_is_better[key] = metric.higher_is_better
            result.warnings += comparison.warnings
            if comparison.details:
                result.details[key] = comparison.details
            if comparison.interval is not None:
                result.intervals[key] = comparison.interval
        result.extractors[extractor.name] = {
            **extractor.identity(),
            "network_precision": self.runtime.precision,
            "compiled": self.runtime.compile,
            "device": str(self.runtime.device),
        }

    def _describe(
        self, result: Result, opened: ImageSet, names: Sequence[str], features: Features
    ) -> Result:
        """Add the combined metric, the conditions of the measurement and warnings to a result."""
        if set(PARTS) <= set(names):
            keys, _ = self._fdr6_keys()
            value, result.details[FDR6], warning = combine(
                self.divisors, keys, result.metrics, self.reference.content_hash()
            )
            result.warnings += [warning] if warning else []
            if value is not None:
                result.metrics[FDR6], result.higher_is_better[FDR6] = value, False
        result.samples.update(
            conditions.describe_samples(opened, features, self.prefer_statistics),
            resize=str(self.preprocess),
        )
        result.reference.update(
            conditions.describe_reference(self.reference, self.prefer_statistics)
        )
        published = self.default.label is None
        if published:
            result.warnings += conditions.convention_warnings(
                names, result.samples, result.reference
            )
        for described in (self.reference, opened):
            result.warnings += described.remarks()
        result.warnings += conditions.identity_warnings(
            self.reference,
            opened,
            self.runtime.precision,
            {name: self.extractors[name].label is None for name in result.extractors},
        )
        return result


def evaluate(reference: Any, samples: Any, **options: Any) -> Result:
    """Evaluate ``samples`` against ``reference``; ``options`` are those of ``Evaluator``.

    Both sets may be a path (.npz, folder, zip, tar, .safetensors, hf://…), a uint8 array or tensor
    (N, H, W, 3) or (N, 3, H, W), a pair (images, labels), a Hugging Face data set, or an iterable
    of batches. The reference may also be the name of a saved reference. In a distributed run every
    rank calls this function and gets the same Result.
    """
    return Evaluator(reference, **options)(samples)
