"""Read WebDataset tar shards with random access: list the files once, then read by offset."""

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

from fid_eval.progress import progress_bar

from ..common.errors import UserError
from .image_folders import ImageFiles, read_class_names, sha256
from .pixels import IMAGE_SUFFIXES


class TarImages(ImageFiles):
    """WebDataset shards: tar files whose samples consist of an image and its label.

    The files of a sample share their path up to the first dot: ``0001.jpg`` with ``0001.cls`` (a
    class number or a class name) or ``0001.json`` with a ``"label"``. A list ``classes.json``
    beside the shards names the class numbers; without it, the number is the name.
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
        locations: list[tuple[int, int, int]] = []
        texts: list[str] = []
        with progress_bar(
            len(self.shards), desc="listing shards", unit="tar", enabled=progress
        ) as bar:
            for number, shard in enumerate(self.shards):
                for name, offset, size, label in _tar_samples(shard):
                    names.append(os.fsencode(name))
                    locations.append((number, offset, size))
                    texts.append(label)
                bar.update()
        if not names:
            raise UserError(f"tar shard {self.shards[0]} has no images")
        self._names = np.array(names)
        self._locations = np.array(locations, np.int64)  # (N, 3): shard, offset, size
        self.class_names, self.labels = _number_classes(texts, self.shards[0].parent)
        readable = self._find_readable(skip_unreadable, progress)
        self._names, self._locations = self._names[readable], self._locations[readable]
        self.labels = self.labels[readable]

    def fingerprint(self) -> str:
        """Return a SHA-256 over the classes, and name, offset, size and label of every image."""
        return sha256(self.class_names, self._names, self._locations, self.labels)

    def name(self, index: int) -> str:
        return f"{self.shards[self._locations[index, 0]]}/{os.fsdecode(self._names[index])}"

    def open_file(self, index: int) -> IO[bytes]:
        shard, offset, size = self._locations[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def tar_shards(source: str | Path) -> list[Path]:
    """Return the tar files that ``source`` names, or an empty list if it names none.

    Args:
        source: a tar file, a folder that contains some, or a pattern. Patterns are those of
            ``glob``, and the ranges ``{000..127}`` of WebDataset, which must be complete.

    Raises:
        UserError: a shard of a range ``{000..127}`` does not exist.
    """
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix == ".tar" and path.is_file():
        return [path]
    shards = []
    for name in _expand_ranges(str(source)):
        matching = [name] if Path(name).is_file() else glob.glob(name)
        matching = [found for found in matching if found.endswith(".tar")]
        if not matching and name != str(source):
            raise UserError(f"tar shard {name} of {source} does not exist")
        shards += sorted(map(Path, matching))
    return shards


def _expand_ranges(pattern: str) -> Iterator[str]:
    """Yield ``pattern`` once for each number of its ranges ``{000..127}``, in order."""
    found = re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*\.tar)", pattern, re.DOTALL)
    if found is None:
        yield pattern
        return
    before, first, last, after = found.groups()
    if int(first) > int(last):
        raise UserError(
            f"tar shards {pattern}: the first number {first} is more than the last, {last}"
        )
    for number in range(int(first), int(last) + 1):
        yield from _expand_ranges(f"{before}{number:0{len(first)}}{after}")


def _tar_samples(shard: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, offset, size and label text of each image in a tar file."""
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
                        assert content is not None  # for mypy: members are regular files
                        try:
                            found = _label_text(content.read(), kind)
                        except UnicodeDecodeError:
                            raise UserError(f"{shard}/{member.name} is not UTF-8 text") from None
                        label = found if found is not None else label
                if image is None:
                    continue
                if label is None:
                    raise UserError(
                        f"{shard}/{image.name} has no label: add a .cls file with the same name, "
                        'or a .json file that contains "label"'
                    )
                yield image.name, image.offset_data, image.size, label
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"tar shard {shard} cannot be read ({error}); decompress compressed tar files first, "
            "because images are read in random order"
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
    """Turn label texts into class names and int64 labels.

    Numbers are used as labels. Names are numbered in the order of ``classes.json``, if there is
    one, or else in sorted order.
    """
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
        raise UserError(f"{folder} has an image of class {negative[0]}: class numbers start at 0")
    names = names or sorted(set(texts))
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(texts) - set(names)):
        raise UserError(f"{folder} has images of class {unknown[0]}, which is not in classes.json")
    return names, np.array([number[text] for text in texts], np.int64)
