"""Give random access to the images of a set that ``fid_eval.sets`` has opened."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import Image

from fid_eval.errors import EvaluationError
from fid_eval.sets.decoding import Preprocess
from fid_eval.sets.encoded import EncodedReader
from fid_eval.sets.files import TarFiles
from fid_eval.sets.image_set import ImageSet as OpenedSet

from ..common.errors import UserError
from .digits import DIGIT_NAMES, load_digit_images

UNLABELLED = ["images"]  # class names of a set without labels


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Raise the errors of ``fid_eval`` as ``UserError``."""
    try:
        yield
    except EvaluationError as error:
        raise UserError(f"{prefix}{error}") from None


class DigitImages:
    """The embedded handwritten digits, resized from 32×32 if another size is requested."""

    def __init__(self, image_size: int):
        images, self.labels = load_digit_images()
        self.image_size = image_size
        self.class_names = list(DIGIT_NAMES)
        self._images = Preprocess(image_size, crop=True).arrays(images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self.labels[index])

    def fingerprint(self) -> str:
        return sha256(self._images, self.labels)


class OpenedImages:
    """Images of a set: base class of ``ImageArrays`` and ``ImageFiles``.

    A set without labels has one class.

    Attributes:
        conversions: number of images by conversion, as far as they have been read.
    """

    def __init__(self, opened: OpenedSet, image_size: int):
        self.source, self.opened, self.image_size = opened.name, opened, image_size
        self.reader: Any = opened.images
        self.conversions: Counter[str] = Counter()
        with user_errors("data "):
            self.class_names = opened.names_of_classes() or UNLABELLED

    @property
    def labels(self) -> np.ndarray:
        """Return the label of each image, int64 (N,)."""
        labels = self.reader.labels
        return np.zeros(len(self), np.int64) if labels is None else labels

    def __len__(self) -> int:
        return self.reader.count


class ImageArrays(OpenedImages):
    """Images of an array, such as ``arr_0`` of an ``.npz``."""

    def __init__(self, opened: OpenedSet, image_size: int):
        super().__init__(opened, image_size)
        if self.reader.max_workers == 1:  # a compressed array, which is slow in random order
            self.reader.array = self.reader.array.read()

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with user_errors("data "):
            return self.reader.read(index, index + 1)[0], int(self.labels[index])

    def fingerprint(self) -> str:
        """Return a SHA-256 over the class names, the labels and the content of the file."""
        return sha256(self.class_names, self.labels, (self.opened.content_hash() or "").encode())


class ImageFiles(OpenedImages):
    """Encoded images: files of a folder, members of archives, or rows of a data set."""

    def __init__(self, opened: OpenedSet, image_size: int):
        super().__init__(opened, image_size)
        self.reader: EncodedReader
        self.reader.digests = None  # Do not hash images while decoding them.

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            pixels, conversions = self.reader.decode(index)
        except EvaluationError as error:
            raise UserError(f"data {error}, or set skip_unreadable to skip such images") from None
        self.conversions.update(conversions)
        return pixels, int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of image ``index``, for messages and lists of images."""
        return f"{self.source}/{self.reader.names[index]}"

    def open_file(self, index: int) -> IO[bytes]:
        """Open the encoded image ``index``."""
        data = self.reader.fetch(index)
        return io.BytesIO(data.tobytes() if isinstance(data, Image.Image) else data)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the class names and the images.

        Images in files and archives are identified by their names and sizes, and by their offsets
        in tar archives. The rows of a Hugging Face data set are identified by their content.
        """
        reader, files = self.reader, self.reader.files
        if files.sizes is None:
            digest = hashlib.sha256()
            for index in range(len(self)):
                with self.open_file(index) as file:
                    digest.update(file.read())
            return sha256(self.class_names, self.labels, digest.digest())
        names = reader.names.array
        if isinstance(files, TarFiles):
            return sha256(self.class_names, names, files.locations[reader.rows], self.labels)
        # Class names and paths determine the labels of class folders.
        labels = [] if self.opened.in_folders else [self.labels]
        return sha256(self.class_names, names, files.sizes[reader.rows], *labels)


def sha256(*parts: list[str] | np.ndarray | bytes) -> str:
    """Return the SHA-256 of all parts in order: lists as JSON, arrays as their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, list):
            part = json.dumps(part).encode()
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()
