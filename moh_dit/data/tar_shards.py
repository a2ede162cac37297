"""WebDataset tar shards as an image set with random access: listed once, then read by offset."""

import contextlib
import glob
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..common.errors import UserError
from ..common.progress import progress_bar
from .image_folders import ImageFiles, read_class_names, sha256
from .pixels import IMAGE_SUFFIXES


class TarImages(ImageFiles):
    """WebDataset shards: tar files of samples, an image and its label side by side.

    The files of a sample share their path up to the first dot: ``0001.jpg`` with ``0001.cls`` (a
    class number, or a class name) or ``0001.json`` with a ``"label"``. Class numbers are named by
    ``classes.json`` (a list) beside the shards where it exists, and otherwise by themselves.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        image_size: int,
        *,
        skip_unreadable: bool = False,
        progress: bool = True,
    ):
        self.shards = list(shards)
        self.image_size = image_size
        names: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        texts: list[str] = []
        with progress_bar(
            len(self.shards), desc="listing shards", unit="tar", enabled=progress
        ) as bar:
            for number, shard in enumerate(self.shards):
                for name, offset, size, label in _tar_samples(shard):
                    names.append(os.fsencode(name))
                    places.append((number, offset, size))
                    texts.append(label)
                bar.update()
        if not names:
            raise UserError(f"tar shard {self.shards[0]} has no images")
        self._names = np.array(names)
        self._places = np.array(places, np.int64)  # (N, 3): shard, offset, size
        self.class_names, self.labels = _number_classes(texts, self.shards[0].parent)
        readable = self._check(skip_unreadable, progress)
        self._names, self._places = self._names[readable], self._places[readable]
        self.labels = self.labels[readable]

    def fingerprint(self) -> str:
        """Over the classes, and the name, place, size and label of every image."""
        return sha256(self.class_names, self._names, self._places, self.labels)

    def _name(self, index: int) -> str:
        return f"{self.shards[self._places[index, 0]]}/{os.fsdecode(self._names[index])}"

    def _open(self, index: int) -> IO[bytes]:
        shard, offset, size = self._places[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def tar_shards(source: str | Path) -> list[Path]:
    """The tar files that ``source`` means: a file, a folder of them, or a pattern.

    Patterns are those of ``glob``, and WebDataset's ``{000..127}``, of which none may be missing.

    Raises:
        UserError: a shard of ``{000..127}`` that is not there.
    """
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix == ".tar" and path.is_file():
        return [path]
    shards = []
    for name in _counted(str(source)):
        matching = [name] if Path(name).is_file() else glob.glob(name)
        matching = [found for found in matching if found.endswith(".tar")]
        if not matching and name != str(source):
            raise UserError(f"tar shard {name} of {source} does not exist")
        shards += sorted(map(Path, matching))
    return shards


def _counted(pattern: str) -> Iterator[str]:
    """Every pattern that one with ``{000..127}`` stands for, one after the other."""
    found = re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*\.tar)", pattern, re.DOTALL)
    if found is None:
        yield pattern
        return
    before, first, last, after = found.groups()
    if int(first) > int(last):
        raise UserError(f"tar shards {pattern}: {first} is more than {last}")
    for number in range(int(first), int(last) + 1):
        yield from _counted(f"{before}{number:0{len(first)}}{after}")


def _tar_samples(shard: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, offset, size and label text of each image in a tar file."""
    try:
        with tarfile.open(shard, "r:") as archive:
            files = (member for member in archive if member.isfile())
            for key, members in itertools.groupby(files, _sample_key):
                image, label = None, None
                for member in members:
                    kind = member.name[len(key) :].lower()
                    if kind in IMAGE_SUFFIXES and image is None:
                        image = member
                    elif kind in (".cls", ".json"):
                        content = archive.extractfile(member)
                        assert content is not None  # it is a file
                        try:
                            found = _label_text(content.read(), kind)
                        except UnicodeDecodeError:
                            raise UserError(f"{shard}/{member.name} is not text") from None
                        label = found if found is not None else label
                if image is None:
                    continue
                if label is None:
                    raise UserError(
                        f"{shard}/{image.name} has no label: each image needs a .cls file, or a "
                        '.json file with "label", beside it'
                    )
                yield image.name, image.offset_data, image.size, label
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"tar shard {shard} cannot be read ({error}); compressed tar files must be unpacked "
            "first, as images are read in any order"
        ) from None


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.split(".", 1)[0])


def _label_text(content: bytes, kind: str) -> str | None:
    if kind == ".cls":
        return content.decode().strip()
    with contextlib.suppress(ValueError, AttributeError):
        label = json.loads(content).get("label")
        return None if label is None else str(label)
    return None


def _number_classes(texts: list[str], folder: Path) -> tuple[list[str], np.ndarray]:
    """Class names and int64 labels from label texts: numbers as they are, names in order."""
    names = read_class_names(folder / "classes.json")
    if all(text.isdecimal() for text in texts):
        labels = np.array([int(text) for text in texts], np.int64)
        names = names or [str(i) for i in range(labels.max() + 1)]
        if labels.max() >= len(names):
            raise UserError(
                f"{folder} has an image of class {labels.max()}, but classes.json names only "
                f"{len(names)} classes"
            )
        return names, labels
    if negative := [text for text in texts if text[:1] == "-" and text[1:].isdecimal()]:
        raise UserError(f"{folder} has an image of class {negative[0]}: classes count from 0")
    names = names or sorted(set(texts))
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(texts) - set(names)):
        raise UserError(f"{folder} has images of class {unknown[0]}, which classes.json lacks")
    return names, np.array([number[text] for text in texts], np.int64)
