"""Image sets: labelled uint8 images of one size, opened by ``open_images`` whatever they are.

Random flips are not done here: whoever trains draws them per batch, so that resume is exact.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .digits import DIGIT_NAMES, load_digit_images
from .progress import progress_bar

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp"),
    *(".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff"),
)


class ImageSet(Protocol):
    """A map-style data set of labelled images, all preprocessed to one square size."""

    image_size: int
    class_names: list[str]
    labels: np.ndarray  # int64 (N,), index into class_names

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return image ``index`` as uint8 (image_size, image_size, 3), and its label."""

    def fingerprint(self) -> str:
        """SHA-256 over what tells this data set from another: changes when the data does."""


def open_images(
    source: str | Path, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
) -> ImageSet:
    """Open ``"digits"`` (embedded) or a folder whose sub-folders are the classes.

    Everything is listed and checked here, before any expensive work.

    Args:
        source: ``"digits"`` or the path of a folder (see ``ImageFolder``).
        image_size: side of the returned images in pixels.
        skip_unreadable: leave out images that cannot be read and say how many, instead of raising.
        progress: show a progress bar over the check.

    Raises:
        UserError: a missing or empty folder, a class without images, images beside the classes,
            an unreadable image (named).
    """
    if image_size < 1:
        raise UserError(f"image size {image_size}: must be at least 1 pixel")
    if str(source) == "digits":
        return DigitImages(image_size)
    return ImageFolder(Path(source), image_size, skip_unreadable=skip_unreadable, progress=progress)


class DigitImages:
    """The embedded handwritten digits, enlarged or reduced from 32×32 where asked."""

    def __init__(self, image_size: int):
        images, self.labels = load_digit_images()
        if image_size != images.shape[1]:
            images = np.stack([center_crop(Image.fromarray(i), image_size) for i in images])
        self.image_size = image_size
        self.class_names = list(DIGIT_NAMES)
        self._images = images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self.labels[index])

    def fingerprint(self) -> str:
        return _sha256(self._images, self.labels)


class ImageFolder:
    """A folder whose sub-folders are the classes; images lie anywhere inside their class.

    Labels follow the sorted names of the class folders, or the order of ``classes.json`` (a list
    of those names) where the folder holds one. Images are sorted by path within a class. Files
    that do not end like an image, and hidden files and folders, are passed over.
    """

    def __init__(
        self, root: Path, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
    ):
        self.root = root
        self.image_size = image_size
        self.class_names = _class_folders(root)
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted(_images_under(root / name))
            if not found:
                raise UserError(
                    f"class folder {root / name} has no images: add some or remove the folder"
                )
            paths += [f"{name}/{path}" for path in found]
            labels += [label] * len(found)
        self.unreadable = self._check(paths, skip_unreadable, progress)
        if self.unreadable:
            readable = [path not in self.unreadable for path in paths]
            paths = [path for path, good in zip(paths, readable, strict=True) if good]
            labels = [label for label, good in zip(labels, readable, strict=True) if good]
            for label in sorted(set(range(len(self.class_names))) - set(labels)):
                raise UserError(
                    f"class folder {root / self.class_names[label]}: none of its images is readable"
                )
        # One array, not a list: a million str objects would be copied into every loader process.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.root / os.fsdecode(self._paths[index])
        try:
            with Image.open(path) as image:
                pixels = center_crop(to_rgb(image), self.image_size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"image {path} cannot be read: {error}") from None
        return pixels, int(self.labels[index])

    def fingerprint(self) -> str:
        """Over the classes, and the path and size of every image."""
        sizes = [os.stat(self.root / os.fsdecode(path)).st_size for path in self._paths]
        return _sha256(json.dumps(self.class_names).encode(), self._paths, np.array(sizes))

    def _check(self, paths: list[str], skip_unreadable: bool, progress: bool) -> dict[str, str]:
        """Return why, for each image that cannot be read."""
        unreadable: dict[str, str] = {}
        with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
            chunks = (paths[i : i + 256] for i in range(0, len(paths), 256))
            with progress_bar(
                len(paths), desc="checking images", unit="img", enabled=progress
            ) as bar:
                for chunk in chunks:  # bounded, so that a first bad image stops the check at once
                    faults = pool.map(_fault, (self.root / path for path in chunk))
                    for path, fault in zip(chunk, faults, strict=True):
                        if fault is None:
                            continue
                        if not skip_unreadable:
                            raise UserError(
                                f"image {self.root / path} cannot be read ({fault}): mend or "
                                "remove it, or set skip_unreadable to leave such images out"
                            )
                        unreadable[path] = fault
                    bar.update(len(chunk))
        if unreadable:
            examples = ", ".join(list(unreadable)[:3])
            print(
                f"skipped {len(unreadable)} of {len(paths)} images of {self.root} that cannot be "
                f"read: {examples}{', …' if len(unreadable) > 3 else ''}",
                file=sys.stderr,
            )
        return unreadable


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Reduce to ``size`` along the shorter side and crop the centre: uint8 (size, size, 3).

    As in training ADM and DiT: halved with a box filter while at least twice too large, then
    bicubic, then the crop. A smaller image is enlarged by the same bicubic step.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert whatever Pillow opened to RGB, upright.

    The EXIF orientation is applied, so that a photo is seen as its viewer shows it. Transparency
    is laid on white. 16-bit grey is scaled to 8 bits (65535 → 255). Of an animation, the first
    frame counts.

    Raises:
        ValueError: pixel values of unknown range (floats, or integers beyond 16 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store it as 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow may open as 32-bit integers
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("integer pixels beyond 16 bits have no known range")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (B, H, W, 3) in 0 … 255 → float32 (B, 3, H, W) in −1 … 1."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    return pixels / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W), −1 … 1, clipped and rounded → uint8 (B, H, W, 3) on the CPU."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def load_batch(images: ImageSet, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read a few images at once: uint8 (B, S, S, 3) and int64 (B,)."""
    pairs = [images[i] for i in indices]
    return np.stack([image for image, _ in pairs]), np.array([y for _, y in pairs], np.int64)


def read_batches(
    images: ImageSet, batches: Iterable[Sequence[int]], num_workers: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``load_batch`` for each list of indices in turn, read ahead by loader processes.

    Raises:
        UserError: an image that cannot be read, in the words of whichever process met it.
    """
    loader: DataLoader = DataLoader(
        _BatchReader(images),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_is,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _BatchReader(Dataset):
    """Hands a user's mistake over as a value: raised in a worker, it would become a traceback."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | UserError:
        try:
            return load_batch(self.images, indices)
        except UserError as error:
            return error


def _as_is(batch: object) -> object:
    return batch


def _class_folders(root: Path) -> list[str]:
    """The names of the class folders, in the order of the labels."""
    if not root.is_dir():
        raise UserError(
            f'data folder {root} does not exist: give "digits" or a folder with one sub-folder '
            "for each class"
        )
    names, loose = [], []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                loose.append(entry.name)
    if loose:
        raise UserError(
            f"data folder {root} has images that belong to no class, {min(loose)} among them: "
            "move them into a sub-folder for each class (one sub-folder if there are no classes)"
        )
    if not names:
        raise UserError(f"data folder {root} is empty: it needs one sub-folder for each class")
    order = root / "classes.json"
    if not order.is_file():
        return sorted(names)
    try:
        classes = json.loads(order.read_text())
    except ValueError as error:
        raise UserError(f"{order} is not JSON: {error}") from None
    if not isinstance(classes, list) or sorted(map(str, classes)) != sorted(names):
        raise UserError(
            f"{order} must be a list of the {len(names)} class folders of {root}, each once"
        )
    return [str(name) for name in classes]


def _images_under(folder: Path) -> Iterator[str]:
    """Paths, relative to ``folder``, of the files that end like images."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")


def _sha256(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def _fault(path: Path) -> str | None:
    """Why an image cannot be read, or None. Cheap for PNG and JPEG, a whole decode otherwise."""
    try:
        with Image.open(path) as image:
            file_format, mode = image.format, image.mode
            if file_format == "PNG" and not mode.startswith(("I", "F")):
                image.verify()  # reads the whole file and compares its checksums
            elif file_format != "JPEG" or not _has_jpeg_end(path):
                to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
    return None


def _has_jpeg_end(path: Path) -> bool:
    """Whether the end-of-image marker is near the end, as in any file that was not cut off."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return b"\xff\xd9" in file.read()
