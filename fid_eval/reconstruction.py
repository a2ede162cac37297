"""Compare originals with the reconstructions of an autoencoder: rFID, PSNR, SSIM and LPIPS."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .choices import RECONSTRUCTION_METRICS, LpipsBackbone, check_reconstruction_metrics
from .conditions import describe_reference
from .distributed import rank_and_world_size
from .errors import EvaluationError
from .features import Runtime
from .metrics.adm import frechet_distance_of_features
from .metrics.image_pairs import PAIR_METRICS, ImagePairs
from .networks.extractors import Extractor, get_extractor, network_precision, wrap_extractor
from .networks.lpips import load_lpips
from .progress import progress_bar
from .references import check_image_size
from .result import Result
from .sets.decoding import Preprocess
from .sets.image_set import ImageSet
from .sets.opening import open_set

Reconstruct = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) to uint8 (B, 3, H, W)


def evaluate_reconstructions(
    originals: Any,
    reconstructions: Any,
    metrics: Sequence[str] = RECONSTRUCTION_METRICS,
    extractor: Any = "inception",
    weights: dict[str, str] | None = None,
    weights_sha256: dict[str, str] | None = None,
    backbone: LpipsBackbone = "vgg",
    resize: int | None = None,
    crop: bool = False,
    background: str = "white",
    strict: bool = False,
    **runtime: Any,
) -> Result:
    """Compare each image with its reconstruction, and the sets by the Fréchet distance.

    rFID compares the reconstructions with the same images, preprocessed in the same way. It is far
    smaller than their FID against a reference of the training set.

    Args:
        originals: held-out images: any source with images that ``evaluate`` accepts.
        reconstructions: their reconstructions in the same order, or a function from uint8
            (B, 3, H, W) to uint8 (B, 3, H, W), which is applied to each batch.
        metrics: names out of rfid, psnr, ssim and lpips.
        extractor: of rFID: a name, an import path, or a module.
        weights: local weights, by name of the extractor or "lpips".
        weights_sha256: expected hashes of the weights, by the same names.
        backbone: of LPIPS: "vgg" or "alex".
        resize: resize both sets to this number of pixels, square; None keeps them.
        crop: crop the centre when resizing, instead of stretching.
        background: colour behind transparent pixels, a name or "#rrggbb".
        strict: refuse images that are not 8-bit RGB, and tars without an end mark.
        runtime: how the networks run; the arguments of ``Runtime``.

    Returns:
        A result with ``rfid`` (``rfd_…`` with another extractor), ``psnr`` in dB, ``ssim`` and
        ``lpips_vgg`` or ``lpips_alex``. PSNR, SSIM and LPIPS are means over images.

    Raises:
        EvaluationError: a set has no images, or the sets differ in number, names or size.
    """
    names = check_reconstruction_metrics(metrics)
    if rank_and_world_size()[1] > 1:
        raise EvaluationError("reconstructions are evaluated by one process; start only one")
    settings = Runtime(**runtime)
    preprocess = Preprocess(resize, crop, background, strict)
    paths, hashes = weights or {}, weights_sha256 or {}
    reference = open_set(originals, preprocess, _name_of(originals, "originals"))
    samples: ImageSet | Reconstruct = reconstructions
    if not callable(reconstructions):
        name = _name_of(reconstructions, "reconstructions")
        samples = open_set(reconstructions, preprocess, name)
    _check_pairs(reference, samples)
    result = Result(samples.name if isinstance(samples, ImageSet) else "reconstructions", {})
    distance, network = None, None
    if "rfid" in names:
        used = (
            get_extractor(extractor, paths.get(extractor), hashes.get(extractor))
            if isinstance(extractor, str)
            else wrap_extractor(extractor)
        )
        check_image_size(reference, used)
        result.extractors[used.name] = used.identity()
        distance = _FeaturePairs(used, settings)
    if "lpips" in names:
        path = Path(paths["lpips"]).expanduser() if "lpips" in paths else None
        network, found = load_lpips(backbone, path, hashes.get("lpips"))
        network.to(settings.device)
        result.extractors["lpips"] = {"name": f"LPIPS {backbone}", "sha256": found}
    for each in result.extractors.values():
        each["network_precision"] = settings.precision
    chosen = [name for name in names if name in PAIR_METRICS]
    pairs = ImagePairs(chosen, settings.device, network) if chosen else None
    started, count = time.monotonic(), 0
    for images, decoded in _batches(reference, samples, settings):
        count += len(images)
        with network_precision(settings.precision, settings.device.type):
            if distance is not None:
                distance.add(images, decoded)
            if pairs is not None:
                pairs.add(images, decoded)
    if distance is not None:
        label = distance.extractor.label
        key = "rfid" if label is None else f"rfd_{label}"
        result.metrics[key], result.higher_is_better[key] = distance.frechet(), False
    if pairs is not None:
        means, identical = pairs.means()
        for name, mean in means.items():
            key = f"lpips_{backbone}" if name == "lpips" else name
            result.metrics[key], result.higher_is_better[key] = mean, name != "lpips"
        if identical:
            over = "that of the others" if identical < count else "infinite"
            result.warnings.append(
                f"{identical:,} of {count:,} pairs are identical; the mean of PSNR is {over}"
            )
    result.reference.update(describe_reference(reference, False), image_count=count)
    result.samples.update(name=result.name, count=count, resize=str(preprocess))
    if isinstance(samples, ImageSet):
        result.samples["sha256"] = samples.content_hash()
    result.seconds["all"] = time.monotonic() - started
    return result


class _FeaturePairs:
    """Pooled features of originals and reconstructions, on the CPU."""

    def __init__(self, extractor: Extractor, settings: Runtime) -> None:
        self.extractor, self.settings = extractor, settings
        self.rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        self.extractor.load(self.settings.device, self.settings.compile)
        for rows, images in zip(self.rows, (originals, reconstructions), strict=True):
            with torch.inference_mode():
                rows.append(self.extractor(images.to(self.settings.device))["pool"].cpu())

    def frechet(self) -> float:
        a, b = (torch.cat(rows).to(self.settings.device) for rows in self.rows)
        return frechet_distance_of_features(a, b)


def _name_of(source: Any, default: str) -> str | None:
    return None if isinstance(source, str | Path) else default


def _check_pairs(reference: ImageSet, samples: ImageSet | Reconstruct) -> None:
    """Raise unless both sets have images that can be paired by their order.

    Files are ordered by name. If both sets have file names, the names must agree, apart from the
    suffix.
    """
    sets = [opened for opened in (reference, samples) if isinstance(opened, ImageSet)]
    for opened in sets:
        if opened.images is None:
            raise EvaluationError(f"{opened.name}: holds no images")
    if len(sets) == 1:
        return
    counts = [opened.count for opened in sets]
    if None not in counts and counts[0] != counts[1]:
        raise EvaluationError(
            f"{sets[0].name} has {counts[0]:,} images and {sets[1].name} has {counts[1]:,}; each "
            "image needs one reconstruction"
        )
    stems = [
        [str(PurePosixPath(name).with_suffix("")) for name in getattr(opened.images, "names", [])]
        for opened in sets
    ]
    if all(stems) and stems[0] != stems[1]:
        first = next(pair for pair in zip(*stems, strict=True) if pair[0] != pair[1])
        raise EvaluationError(
            f"{sets[1].name}: {first[1]} would be paired with {first[0]} of {sets[0].name}; give "
            "reconstructions the names of their images"
        )


def _batches(
    reference: ImageSet, reconstructions: ImageSet | Reconstruct, settings: Runtime
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and of their reconstructions, both uint8 (B, 3, H, W)."""

    def read(opened: ImageSet) -> Iterator[Tensor]:
        assert opened.images is not None
        batches = opened.images.batches(
            settings.batch_size, lambda chunk: True, settings.workers, settings.device
        )
        return (images for _, images, _ in batches)

    decoded = read(reconstructions) if isinstance(reconstructions, ImageSet) else None
    with progress_bar(
        reference.count, desc=reference.name, unit=" images", enabled=not settings.quiet
    ) as bar:
        for images in read(reference):
            other = next(decoded, None) if decoded is not None else reconstructions(images)  # type: ignore[operator]
            if other is None or len(other) != len(images):
                raise EvaluationError("there are fewer reconstructions than images")
            yield images, other
            bar.update(len(images))
    if decoded is not None and next(decoded, None) is not None:
        raise EvaluationError("there are more reconstructions than images")
