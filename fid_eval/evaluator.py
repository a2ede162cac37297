"""``evaluate``: metrics of a sample set against a reference, as a library and for the command."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from . import metric_checks as planning
from .distributed import choose_device, on_first, world
from .errors import EvaluationError
from .features import Features, Runtime, extract, reading_ahead
from .metric_registry import DEFAULT_METRICS, METRICS, Pair
from .metrics.neighbours import Precision
from .networks.extractors import Extractor, NetworkPrecision, get_extractor, wrap_extractor
from .references import check_reference, open_reference
from .sets.decoding import Preprocess
from .sets.image_set import ImageSet
from .sets.opening import open_set

ReferenceKind = Literal["auto", "statistics", "images"]


@dataclass
class Result:
    """The numbers of one sample set, with what a reader needs to trust them.

    ``result["fid"]`` is the number; ``metrics`` all of them in the order asked for.
    """

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    def __getitem__(self, key: str) -> float:
        return self.metrics[key]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(vars(self))


class Evaluator:
    """A reference, its features and the networks, kept for any number of sample sets.

    ``reference``: a path, a saved name, an array, a dataset or an iterable of batches.
    ``metrics``: names of ``METRICS``; by default ADM's five, or those that the reference allows.
    ``extractor``: a name, an import path, or a module uint8 (B, 3, H, W) → (B, d).
    ``weights``: path, or {extractor name: path}; ``weights_sha256`` likewise.
    ``distances``: ``adm-fp16`` (default with Inception, as in papers) or ``fp32``.
    ``reference_kind``: take the Fréchet distance from stored ``statistics`` or from ``images``.
    ``bootstrap``: number of resamples for 95 % intervals, 0 for none.
    ``resize``, ``crop``: only if asked are images made one size.
    ``cache``: a folder in which features are kept by content hash.
    Raises EvaluationError, a ValueError, for anything the user can mend.
    """

    def __init__(
        self,
        reference: Any,
        metrics: Sequence[str] | None = None,
        extractor: Any = "inception",
        weights: str | Path | dict[str, str] | None = None,
        weights_sha256: str | dict[str, str] | None = None,
        distances: Precision | None = None,
        k: int = 3,
        bootstrap: int = 0,
        reference_kind: ReferenceKind = "auto",
        resize: int | None = None,
        crop: bool = False,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        precision: NetworkPrecision = "float32",
        compile: bool = False,
        cache: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        if crop and resize is None:
            raise EvaluationError("--crop needs --resize SIZE: to what size?")
        world()
        self.preprocess = Preprocess(resize, crop)
        self.explicit = metrics is not None
        self.names = planning.check_metrics(metrics or DEFAULT_METRICS)
        self.runtime = Runtime(
            choose_device(device),
            batch_size=batch_size or 0,
            workers=workers or 0,
            precision=precision,
            compile=compile,
            cache=Path(cache).expanduser() if cache else None,
            quiet=quiet,
        )
        self.distances, self.k, self.bootstrap = distances, k, bootstrap
        self.reference_kind = reference_kind
        self.weights, self.weights_sha256 = weights, weights_sha256
        self.default = (
            get_extractor(extractor, *self._weights_of(extractor, True))
            if isinstance(extractor, str)
            else wrap_extractor(extractor)
        )
        self.extractors: dict[str, Extractor] = {self.default.name: self.default}
        self.reference = open_reference(reference, self.preprocess)
        self._reference_features: dict[str, Features] = {}

    def _weights_of(self, name: str, is_default: bool) -> tuple[Any, Any]:
        def of(option: Any) -> Any:
            if isinstance(option, dict):
                return option.get(name)
            return option if is_default else None

        return of(self.weights), of(self.weights_sha256)

    def extractor_of(self, metric: str) -> Extractor:
        """The extractor that a metric is measured with."""
        name = METRICS[metric].extractor
        if name is None or name == self.default.name:
            return self.default
        if name not in self.extractors:
            self.extractors[name] = get_extractor(name, *self._weights_of(name, False))
        return self.extractors[name]

    def load(self) -> None:
        """Build the networks now, fetching their weights, rather than at the first set."""
        for extractor in map(self.extractor_of, self.names):
            build = partial(extractor.load, self.runtime.device, self.runtime.compile)
            on_first(build)  # which fetches them
            build()

    def open(self, samples: Any, name: str | None = None) -> ImageSet:
        """Open a sample set and check that everything asked for can be measured on it."""
        opened = open_set(samples, self.preprocess, name)
        self.plan(opened, self.names, self.explicit)
        return opened

    def plan(
        self, samples: ImageSet, names: Sequence[str], explicit: bool
    ) -> tuple[list[str], list[str]]:
        """(metrics that can be measured, why others cannot); raises if one was asked for."""
        possible, missing = [], []
        names = list(names)
        for opened in (self.reference, samples):
            planning.check_count(opened, self.k if {"precision", "recall"} & set(names) else None)
        if not explicit and self.default.knows_labels:
            names.append("accuracy")
        for name in names:
            extractor = self.extractor_of(name)
            check_reference(self.reference, samples, extractor, self.preprocess)
            reason = self._obstacle(name, extractor, samples)
            if reason is None:
                possible.append(name)
            elif explicit:
                raise EvaluationError(f"{samples.name}: {name} cannot be measured: {reason}")
            elif name != "accuracy":
                missing.append(f"{name} not measured: {reason}")
        if not possible:
            raise EvaluationError(f"{samples.name}: nothing can be measured: {'; '.join(missing)}")
        return possible, missing

    def _obstacle(self, name: str, extractor: Extractor, samples: ImageSet) -> str | None:
        metric = METRICS[name]
        if name == "accuracy" and not extractor.knows_labels:
            return f"the classes of the extractor {extractor.name} are not the data's labels"
        for side, opened, needs in (
            ("reference", self.reference, metric.reference),
            ("samples", samples, metric.samples),
        ):
            for need in sorted(needs):
                reason = planning.obstacle(opened, need, extractor)
                if reason is not None:
                    return f"{side} {opened.name}: {reason}"
        return None

    def __call__(
        self, samples: Any, name: str | None = None, metrics: Sequence[str] | None = None
    ) -> Result:
        """Measure one sample set: anything that ``open_set`` takes."""
        opened = open_set(samples, self.preprocess, name)
        names = planning.check_metrics(metrics) if metrics is not None else self.names
        names, missing = self.plan(opened, names, metrics is not None or self.explicit)
        started = time.monotonic()
        result = Result(opened.name, {}, warnings=missing)
        groups: dict[str, list[str]] = {}
        for metric in names:
            groups.setdefault(self.extractor_of(metric).name, []).append(metric)
        count = computed = 0
        seconds = 0.0
        for extractor_name, group in groups.items():
            extractor = self.extractors[extractor_name]
            begun = time.monotonic()
            with reading_ahead(opened, self.runtime):
                reference = self._features_of_reference(extractor, group)
            result.seconds[f"reference, {extractor_name}"] = time.monotonic() - begun
            features = self._features(opened, extractor, group, "samples")
            # an iterable's size and labels are known only now
            check_reference(self.reference, opened, extractor, self.preprocess)
            count, computed = features.count, computed + features.computed
            seconds += features.seconds
            result.seconds[f"samples, {extractor_name}"] = features.seconds
            if on_first(lambda: features.labels is None):  # noqa: B023
                unlabelled = [m for m in group if "labels" in METRICS[m].samples]
                if unlabelled and (self.explicit or metrics is not None):
                    raise EvaluationError(f"{opened.name}: {unlabelled[0]} needs labelled batches")
                group[:] = [m for m in group if m not in unlabelled]
            on_first(lambda: self._measure(result, group, extractor, reference, features))  # noqa: B023
        result = on_first(lambda: self._describe(result, opened, groups, count))
        keys = [METRICS[metric].key(self.extractor_of(metric)) for metric in names]
        result.metrics = {key: result.metrics[key] for key in keys if key in result.metrics}
        result.seconds["all"] = time.monotonic() - started
        result.samples["images_per_second"] = computed / seconds if computed else None
        return result

    def _features_of_reference(self, extractor: Extractor, group: Iterable[str]) -> Features:
        wanted = [
            name
            for name in dict.fromkeys([*self.names, *group])
            if self.extractor_of(name) is extractor
            and all(
                planning.obstacle(self.reference, n, extractor) is None
                for n in METRICS[name].reference
            )
        ]
        needs = frozenset().union(*(METRICS[name].reference for name in wanted))
        held = self._reference_features.get(extractor.name)
        if held is None or not needs <= held.__dict__["needs"]:
            held = self._features(self.reference, extractor, wanted, "reference")
            held.__dict__["needs"] = needs
            self._reference_features[extractor.name] = held
        return held

    def _features(
        self, opened: ImageSet, extractor: Extractor, names: Iterable[str], side: str
    ) -> Features:
        """What the metrics ``names`` need of a set: stored, or by a pass over its images."""
        needs = frozenset().union(*(getattr(METRICS[name], side) for name in names))
        stored = {
            layer: (
                torch.from_numpy(opened.statistics[m]).double(),
                torch.from_numpy(opened.statistics[c]).double(),
            )
            for layer, m, c in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
            if m in opened.statistics and self._uses_statistics(opened, side)
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
            features = Features(int(opened.metadata.get("count", 0)))
        else:
            assert opened.images is not None
            features = extract(opened, extractor, keep, moments, self.runtime)
        return replace(features, stored=stored)

    def _uses_statistics(self, opened: ImageSet, side: str) -> bool:
        if side == "reference" and self.reference_kind == "images":
            return False
        return opened.images is None or side == "reference"

    def _measure(
        self,
        result: Result,
        group: list[str],
        extractor: Extractor,
        reference: Features,
        features: Features,
    ) -> None:
        mode = self.distances or ("adm-fp16" if extractor.label is None else "fp32")
        pair = Pair(
            reference, features, extractor, self.runtime.device, mode, self.k, self.bootstrap
        )
        for name in group:
            metric = METRICS[name]
            key = metric.key(extractor)
            pair.details, pair.interval = {}, None
            started = time.monotonic()
            result.metrics[key] = metric.measure(pair)
            result.seconds[key] = time.monotonic() - started
            result.higher_is_better[key] = metric.higher_is_better
            if pair.details:
                result.details[key] = pair.details
            if pair.interval is not None:
                result.intervals[key] = pair.interval
        result.extractors[extractor.name] = {
            **extractor.identity(),
            "network_precision": self.runtime.precision,
            "compiled": self.runtime.compile,
            "device": str(self.runtime.device),
        }

    def _describe(
        self, result: Result, opened: ImageSet, groups: dict[str, list[str]], count: int
    ) -> Result:
        names = [name for group in groups.values() for name in group]
        size = opened.images.size if opened.images is not None else None
        result.samples.update(
            name=opened.name,
            kind=opened.kind,
            count=count,
            image_size=size,
            sha256=opened.content_hash(),
            resize=str(self.preprocess),
        )
        ref = self.reference
        images = ref.images.count if ref.images is not None else None
        features = len(ref.features["pool"]) if ref.features else None
        used = "statistics" if ref.statistics and self.reference_kind != "images" else "images"
        if used == "images" and ref.features:
            used = "features"
        result.reference.update(
            name=ref.name,
            kind=ref.kind,
            frechet_from=used,
            sha256=ref.content_hash(),
            statistics_count=ref.metadata.get("count"),
            image_count=images or features,
        )
        if self.default.label is None:
            result.warnings += planning.convention_warnings(names, count, used, images or features)
        result.warnings += planning.identity_warnings((ref, opened), self.runtime.precision)
        if planning.looks_swapped(ref, opened):
            result.warnings.append(
                f"{ref.name} looks like samples and {opened.name} like a reference: swapped? The "
                "reference comes first"
            )
        return result


def evaluate(reference: Any, samples: Any, **options: Any) -> Result:
    """Measure ``samples`` against ``reference``; options as in ``Evaluator``.

    Both may be a path (.npz, folder, zip, tar, .safetensors, hf://…), a saved reference's name, a
    uint8 array or tensor (N, H, W, 3) or (N, 3, H, W), a pair (images, labels), a Hugging Face
    dataset, or an iterable of such batches. In a distributed run every process calls it and gets
    the same Result.
    """
    return Evaluator(reference, **options)(samples)
