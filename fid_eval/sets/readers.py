"""Read images in a fixed order and in batches, from arrays or iterables."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import EvaluationError
from .decoding import BadImage, Preprocess, decode
from .loading import CHUNK, CPU, PROCESSES_FROM, Owned, batch_spans, load_spans

Batch = tuple[int, Tensor, Tensor | None]  # first index, uint8 (n, 3, H, W), labels (n,)
END = object()  # follows the last batch of an iterable


class ImageReader:
    """Base class: images of one size in a fixed order.

    Subclasses implement ``read`` or ``batches``, and ``read_into`` if they set ``decodes``.
    """

    count: int | None = None  # unknown (None) until an iterable is exhausted
    size: tuple[int, int] | None = None  # (height, width) after preprocessing
    labels: np.ndarray | None = None  # int64 (count,)
    max_workers: int | None = None  # 1 if rows can only be read in order
    decodes = False  # reading is CPU-bound: worker processes may speed it up
    is_share = False  # each rank holds its own part of the set
    digests: dict[int, str] | None = None  # SHA-256 of images decoded so far; None if not hashed
    conversions: Counter[str]  # number of images by conversion, as far as they have been read
    ahead: tuple[list, Any] | None = None  # spans being loaded, and their loader

    @property
    def chunks(self) -> int:
        """Return the number of chunks, 0 if it is unknown."""
        return math.ceil((self.count or 0) / CHUNK)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images ``start`` to ``stop``, uint8 (stop − start, H, W, 3)."""
        raise NotImplementedError

    def content_hash(self) -> str | None:
        """Return the SHA-256 of the contents, or None if they are unknown or hashed as a file."""
        return None

    def file_digests(self) -> dict[str, str]:
        """Return the known SHA-256 of files of a folder, by their names in it."""
        return {}

    def batches(
        self, batch_size: int, owned: Owned, workers: int, device: torch.device = CPU
    ) -> Iterator[Batch]:
        """Iterate over the batches of all chunks for which ``owned(chunk)`` is true.

        Loading starts immediately. Batches are on the CPU, in pinned memory if ``device`` is a GPU.
        """
        self.read_ahead(batch_size, owned, workers, device)
        assert self.ahead is not None
        (spans, loaded), self.ahead = self.ahead, None

        def batch(span: tuple[int, int], images: Tensor) -> Batch:
            labels = None if self.labels is None else torch.from_numpy(self.labels[slice(*span)])
            return span[0], images.permute(0, 3, 1, 2), labels

        return map(batch, spans, loaded)

    def read_ahead(self, batch_size: int, owned: Owned, workers: int, device: torch.device) -> None:
        """Start to load the batches that ``batches`` will return for the same arguments."""
        assert self.count is not None
        spans = list(batch_spans(self.count, batch_size, owned))
        if self.ahead is not None and spans == self.ahead[0]:
            return
        self.cancel_read_ahead()
        workers = min(workers, self.max_workers or workers)
        decoding = self.decodes and self.count >= PROCESSES_FROM
        self.ahead = spans, load_spans(self, spans, batch_size, workers, decoding, device)

    def cancel_read_ahead(self) -> None:
        """Stop loading what ``read_ahead`` started."""
        if self.ahead is not None:
            self.ahead[1].close()
        self.ahead = None


class ArrayReader(ImageReader):
    """Reads uint8 images from a NumPy array, a torch tensor or a member of an .npz."""

    def __init__(self, array: Any, name: str, preprocess: Preprocess, labels: Any = None) -> None:
        self.array, self.name, self.preprocess = array, name, preprocess
        shape = tuple(array.shape)
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype != "uint8":
            hint = (
                "scale them to 0..255, round and cast to uint8"
                if dtype.startswith(("float", "bfloat"))
                else "convert them to 8 bits"
            )
            raise EvaluationError(f"{name}: images have dtype {dtype}; uint8 is needed: {hint}")
        self.layout = image_layout(shape, name)
        self.count = shape[0]
        if self.count == 0:
            raise EvaluationError(f"{name}: holds no images")
        height, width = shape[2:4] if self.layout == "NCHW" else shape[1:3]
        self.size = (height, width) if preprocess.size is None else (preprocess.size,) * 2
        self.labels = check_labels(labels, self.count, name)
        self.conversions = Counter()
        if self.layout == "NHW":
            self.conversions["grey converted to RGB"] = self.count
            if preprocess.strict:
                raise EvaluationError(f"{name}: --strict refuses grey images")
        self.max_workers = 1 if getattr(array, "compressed", False) else None

    def read(self, start: int, stop: int) -> np.ndarray:
        if hasattr(self.array, "read"):
            images = self.array.read(start, stop)
        else:
            images = as_numpy(self.array[start:stop])
        return self.preprocess.arrays(to_nhwc(images, self.layout))

    def content_hash(self) -> str | None:
        if hasattr(self.array, "read"):
            return None  # The whole file is hashed instead.
        digest = hashlib.sha256(repr((self.array.shape, self.preprocess)).encode())
        for start in range(0, self.count or 0, CHUNK):
            piece = as_numpy(self.array[start : start + CHUNK])
            digest.update(np.ascontiguousarray(piece).data)
        return digest.hexdigest()


class IterableReader(ImageReader):
    """Reads batches from a data loader or a model: uint8 images, or (images, labels).

    The images are regrouped into batches of the requested size. In a distributed run every rank
    must yield the same images, of which it uses its own chunks, unless they are in a ``Share``.
    """

    def __init__(self, batches: Iterable, name: str, preprocess: Preprocess, share: bool) -> None:
        self.source, self.name, self.preprocess = iter(batches), name, preprocess
        self.is_share = share
        self.conversions = Counter()
        self.labelled: bool | None = None  # whether the first batch had labels

    def batches(
        self, batch_size: int, owned: Owned, workers: int, device: torch.device = CPU
    ) -> Iterator[Batch]:
        held: list[list[Tensor]] = []  # [images] or [images, labels] of batches to regroup
        position = available = 0
        for item in chain(self.source, [END]):
            if item is not END:
                held.append(self._convert(item))
                available += len(held[-1][0])
            while available:
                count = min(batch_size, CHUNK - position % CHUNK)
                if available < count and item is not END:
                    break
                joined = [torch.cat(parts) for parts in zip(*held, strict=True)]
                held = [[part[count:] for part in joined]] if available > count else []
                images, labels = joined[0][:count], joined[1][:count] if self.labelled else None
                if owned(position // CHUNK):
                    yield position, images, labels
                position += len(images)
                available -= len(images)
        if position == 0:
            raise EvaluationError(f"{self.name}: the iterable yielded no images")
        self.count = position

    def _convert(self, item: Any) -> list[Tensor]:
        """Return the images of a batch, uint8 (n, 3, H, W), and its labels if it has any."""
        images, labels = item, None
        if isinstance(item, tuple | list) and len(item) == 2 and not _are_pictures(item):
            images, labels = item
        if _are_pictures(images):
            images = self._pixels(images)
        try:
            images = torch.as_tensor(images).detach()
        except (TypeError, ValueError, RuntimeError):
            raise EvaluationError(
                f"{self.name}: a batch must be uint8 images (N, H, W, 3) or (N, 3, H, W), with or "
                f"without labels, not a {type(images).__name__}"
            ) from None
        if images.dtype != torch.uint8:
            raise EvaluationError(
                f"{self.name}: a batch has dtype {images.dtype}; uint8 is needed: scale to 0..255, "
                "round and cast to uint8"
            )
        if image_layout(tuple(images.shape), self.name) != "NCHW":
            images = torch.from_numpy(to_nhwc(images.cpu().numpy(), "NHWC")).permute(0, 3, 1, 2)
        if self.preprocess.size is not None:
            array = self.preprocess.arrays(images.permute(0, 2, 3, 1).cpu().numpy())
            images = torch.from_numpy(array).permute(0, 3, 1, 2)
        size = (images.shape[2], images.shape[3])
        if self.size is not None and size != self.size:
            raise EvaluationError(
                f"{self.name}: images of {self.size} and of {size} pixels; give images of one "
                "size, or resize them"
            )
        self.size = size
        if self.labelled not in (None, labels is not None):
            raise EvaluationError(f"{self.name}: some batches have labels and others have none")
        self.labelled = labels is not None
        if labels is None:
            return [images]
        labels = check_labels(np.atleast_1d(as_numpy(labels)), len(images), self.name)
        return [images, torch.from_numpy(labels)]

    def _pixels(self, pictures: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Convert one or several Pillow images to uint8 (N, H, W, 3)."""
        pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
        arrays = []
        for picture in pictures:
            try:
                pixels, conversions = decode(picture, self.preprocess)
            except BadImage as error:
                raise EvaluationError(f"{self.name}: an image cannot be used: {error}") from None
            arrays.append(pixels)
            self.conversions.update(conversions)
        if len({array.shape for array in arrays}) > 1:
            raise EvaluationError(f"{self.name}: images of different sizes; resize them")
        return np.stack(arrays)


def _are_pictures(item: Any) -> bool:
    items = item if isinstance(item, tuple | list) and item else [item]
    return all(isinstance(part, Image.Image) for part in items)


@dataclass
class Share:
    """Marks an iterable of batches as this rank's own part of a distributed set.

    Without ``Share``, every rank must yield the same images, and the ranks divide the work.
    """

    batches: Iterable


def as_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def image_layout(shape: tuple[int, ...], name: str) -> str:
    """Return "NHWC", "NCHW" or "NHW" for a shape; raise unless it holds grey or RGB images."""
    if 0 in shape[1:]:
        raise EvaluationError(f"{name}: images of shape {shape[1:]} have no pixels")
    if len(shape) == 3 and shape[2] in (3, 4):
        raise EvaluationError(
            f"{name}: an array of shape {shape} is one image; give batches (N, H, W, 3)"
        )
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return "NHW"
    if len(shape) == 4 and shape[3] == 3:
        return "NHWC"
    if len(shape) == 4 and shape[1] == 3:
        return "NCHW"
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        raise EvaluationError(
            f"{name}: shape {shape} has 4 channels; flatten the transparency first"
        )
    raise EvaluationError(
        f"{name}: an array of shape {shape} does not hold images; give (N, H, W, 3), "
        "(N, 3, H, W) or grey (N, H, W)"
    )


def to_nhwc(images: np.ndarray, layout: str) -> np.ndarray:
    """Convert images of ``layout`` to RGB (N, H, W, 3)."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim == 3:
        return np.repeat(images[..., None], 3, axis=3)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if layout == "NCHW" else images


def check_labels(labels: Any, count: int, name: str) -> np.ndarray | None:
    """Return labels as int64 (count,).

    Raises:
        EvaluationError: the labels are not ``count`` integers of at least 0.
    """
    if labels is None:
        return None
    labels = as_numpy(labels)
    check_label_shape(labels.shape, (count,), name)
    try:
        with np.errstate(invalid="ignore"):
            converted = labels.reshape(count).astype(np.int64)
        is_exact = bool(np.all(converted == labels.reshape(count)))
    except (OverflowError, TypeError, ValueError):
        is_exact = False
    if not is_exact:
        raise EvaluationError(f"{name}: labels must be integers of at most 63 bits")
    if count and converted.min() < 0:
        row = int(converted.argmin())
        raise EvaluationError(
            f"{name}: image {row} (counted from 0) has the label {converted[row]}; class numbers "
            "start at 0"
        )
    return converted


def check_label_shape(shape: tuple[int, ...], count: tuple[int, ...], name: str) -> None:
    """Raise unless labels have the shape (N,) or (N, 1) for ``count`` (N,) images."""
    if shape not in (count, (*count, 1)):
        raise EvaluationError(f"{name}: {count[0]} images, but labels of shape {shape}")
