"""Open the embedded digits and class folders, and define the base class for encoded images.

Names and labels are stored in arrays. Lists of a million Python objects would be copied into every
data-loader worker.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from fid_eval.progress import progress_bar

from ..common.errors import UserError
from .digits import DIGIT_NAMES, load_digit_images
from .pixels import IMAGE_SUFFIXES, center_crop, find_defect, read_pixels


class DigitImages:
    """The embedded handwritten digits, resized from 32×32 if another size is requested."""

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
        return sha256(self._images, self.labels)


class ImageFiles:
    """Base class of image sets made of encoded files. It reads single images and checks all."""

    image_size: int
    class_names: list[str]
    labels: np.ndarray
    unreadable: dict[str, str]  # name of each skipped image, and the reason

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            with self.open_file(index) as file:
                pixels = read_pixels(file, self.image_size)
        except (OSError, ValueError) as error:
            raise UserError(f"image {self.name(index)} cannot be read: {error}") from None
        return pixels, int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of image ``index``, for messages and lists of images."""
        raise NotImplementedError

    def open_file(self, index: int) -> IO[bytes]:
        """Open the encoded image ``index``."""
        raise NotImplementedError

    def _find_readable(self, skip_unreadable: bool, progress: bool) -> np.ndarray:
        """Check every image and return which ones are readable, bool (N,)."""

        def unreadable_reason(index: int) -> str | None:
            try:
                with self.open_file(index) as file:
                    return find_defect(file)
            except OSError as error:
                return error.strerror or str(error)

        total = len(self)
        readable = np.ones(total, bool)
        self.unreadable = {}
        with (
            ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool,
            progress_bar(total, desc="checking images", unit="img", enabled=progress) as bar,
        ):
            for start in range(0, total, 256):  # in chunks, so that an error stops early
                chunk = range(start, min(start + 256, total))
                for index, reason in zip(chunk, pool.map(unreadable_reason, chunk), strict=True):
                    if reason is None:
                        continue
                    if not skip_unreadable:
                        raise UserError(
                            f"image {self.name(index)} cannot be read ({reason}): repair or "
                            "remove it, or set skip_unreadable to skip such images"
                        )
                    self.unreadable[self.name(index)] = reason
                    readable[index] = False
                bar.update(len(chunk))
        if self.unreadable:
            examples = ", ".join(itertools.islice(self.unreadable, 3))
            more = ", …" if len(self.unreadable) > 3 else ""
            print(
                f"skipped {len(self.unreadable)} of {total} images because they cannot be read: "
                f"{examples}{more}",
                file=sys.stderr,
            )
            if not readable.any():
                raise UserError("none of the images can be read")
        return readable


class ImageFolder(ImageFiles):
    """A folder with one sub-folder for each class, which contains images at any depth.

    Labels follow the sorted names of the class folders, or the order in ``classes.json`` (a list
    of these names) if the folder contains one. Images are sorted by path within a class. Hidden
    files and folders, and files without an image suffix, are ignored.
    """

    def __init__(
        self, root: Path, image_size: int, *, skip_unreadable: bool = False, progress: bool = True
    ):
        self.root = root
        self.image_size = image_size
        self.class_names = _class_folders(root)
        paths: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted(_images_under(root / name))
            if not found:
                raise UserError(
                    f"class folder {root / name} has no images: add images or remove the folder"
                )
            paths += [os.fsencode(f"{name}/{path}") for path in found]
            labels += [label] * len(found)
        self._paths = np.array(paths)
        self.labels = np.array(labels, np.int64)
        readable = self._find_readable(skip_unreadable, progress)
        self._paths, self.labels = self._paths[readable], self.labels[readable]
        for label in sorted(set(range(len(self.class_names))) - set(self.labels.tolist())):
            raise UserError(
                f"class folder {root / self.class_names[label]}: none of its images is readable"
            )

    def fingerprint(self) -> str:
        """Return a SHA-256 over the class names, and the path and size of every image."""
        sizes = [os.stat(self.root / os.fsdecode(path)).st_size for path in self._paths]
        return sha256(self.class_names, self._paths, np.array(sizes))

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._paths[index]))

    def open_file(self, index: int) -> IO[bytes]:
        return open(self.name(index), "rb")


def _class_folders(root: Path) -> list[str]:
    """Return the names of the class folders, in the order of the labels."""
    if not root.is_dir():
        raise UserError(
            f"data {root} is not a folder: give a folder with one sub-folder for each class"
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
            f"data folder {root} has images outside its class folders, for example {min(loose)}: "
            "move them into one sub-folder for each class (a single one if there are no classes)"
        )
    if not names:
        raise UserError(f"data folder {root} has no sub-folders: it needs one for each class")
    order = root / "classes.json"
    classes = read_class_names(order)
    if classes is None:
        return sorted(names)
    if sorted(classes) != sorted(names):
        raise UserError(
            f"{order} must be a list that names each of the {len(names)} class folders of {root} "
            "exactly once"
        )
    return classes


def read_class_names(path: Path) -> list[str] | None:
    """Read the list of class names in ``classes.json``, or return ``None`` without that file."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(names, list) or not names or len(set(map(str, names))) != len(names):
        raise UserError(f"{path} must be a list of distinct class names")
    return [str(name) for name in names]


def _images_under(folder: Path) -> Iterator[str]:
    """Yield the paths of all files with an image suffix, relative to ``folder``."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_link_to_parent(Path(parent, name))
        ]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")


def _is_link_to_parent(folder: Path) -> bool:
    """Return whether a folder is a link to one of its parents, which would be walked forever."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(parent.resolve() == target for parent in folder.absolute().parents)


def sha256(*parts: list[str] | np.ndarray | bytes) -> str:
    """Return the SHA-256 of all parts in order: lists as JSON, arrays as their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, list):
            part = json.dumps(part).encode()
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()
