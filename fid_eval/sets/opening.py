"""Open a set of images: a path, an array, a Hugging Face data set or an iterable of batches."""

import glob
import json
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import EvaluationError, describe_error, printable
from .decoding import AS_IS, EXTENSIONS, MAX_BYTES, BadImage, Preprocess, check_file
from .encoded import EncodedReader
from .hashing import files_inside
from .hugging_face import import_datasets, is_hub_url, open_dataset, open_hub
from .image_set import ImageSet
from .readers import ArrayReader, IterableReader, Share
from .stored_arrays import open_npz, open_safetensors


def open_set(source: Any, preprocess: Preprocess = AS_IS, name: str | None = None) -> ImageSet:
    """Open a path, array, tensor, Hugging Face data set or iterable of batches as an ImageSet.

    Image headers are checked here; the images are decoded later.

    Raises:
        EvaluationError: the set is missing, empty or truncated, or its images differ in size.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, str | Path):
        return open_path(str(source), preprocess, name)
    name = name or "samples"
    if isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "shape"):
        images, labels = source
        return ImageSet(name, "array", ArrayReader(images, name, preprocess, labels))
    if isinstance(source, np.ndarray | Tensor):
        return ImageSet(name, "array", ArrayReader(source, name, preprocess))
    if hasattr(source, "features") and hasattr(source, "column_names"):
        return open_dataset(source, preprocess, name)
    if isinstance(source, dict):
        raise EvaluationError(
            f"{name}: is a dictionary of {', '.join(map(str, source))}; choose one"
        )
    share = isinstance(source, Share)
    batches = source.batches if isinstance(source, Share) else source
    if isinstance(batches, Iterable):
        return ImageSet(name, "iterable", IterableReader(batches, name, preprocess, share))
    raise EvaluationError(
        f"{name}: a {type(source).__name__} is not a set of images; give a path, a uint8 array "
        "(N, H, W, 3), or an iterable of such arrays"
    )


def open_path(path: str, preprocess: Preprocess, name: str | None) -> ImageSet:
    """Open a path, a glob pattern or a Hugging Face URL; see ``open_set``."""
    name = printable(name or path)
    try:
        return _open_path(path, preprocess, name)
    except EvaluationError:
        raise
    except Exception as error:  # Packages raise many types for foreign or damaged files.
        raise EvaluationError(f"{name}: cannot be read: {describe_error(error)}") from error


def _open_path(path: str, preprocess: Preprocess, name: str) -> ImageSet:
    if is_hub_url(path):
        return open_hub(path, preprocess, name)
    if any(c in path for c in "*{") and not os.path.exists(path):
        return _open_tars(_expand(path), preprocess, name)
    location = Path(path).expanduser()
    if not os.path.exists(location):
        raise EvaluationError(f"{path}: no such file or folder")
    if not location.is_dir():
        _check_regular(location)
    else:
        if (location / "state.json").exists() or (location / "dataset_dict.json").exists():
            opened = open_dataset(import_datasets().load_from_disk(path), preprocess, name)
        elif tars := sorted(location.glob("*.tar")):
            opened = _open_tars(tars, preprocess, name)
        else:
            opened = _open_folder(location, preprocess, name)
        opened.path = location
        return opened
    suffix = location.suffix.lower()
    if suffix == ".npz":
        return open_npz(location, preprocess, name)
    if suffix == ".safetensors":
        return open_safetensors(location, name)
    if suffix == ".zip":
        return _open_zip(location, preprocess, name)
    if suffix == ".tar":
        return _open_tars([location], preprocess, name)
    if location.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
        raise EvaluationError(
            f"{path}: compressed tars allow no random access; decompress it to .tar"
        )
    if suffix == ".npy":
        try:
            array = np.load(location, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise EvaluationError(f"{name}: not a complete .npy of images ({error})") from None
        return ImageSet(name, "npy", ArrayReader(array, name, preprocess), path=location)
    raise EvaluationError(
        f"{path}: not a set of images: give a folder, .npz, .npy, .zip, .tar or .safetensors"
    )


def _check_regular(path: Path) -> None:
    """Raise if ``path`` is a FIFO, socket or device, because reading it may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise EvaluationError(f"{path}: is not a regular file")


def _open_folder(path: Path, preprocess: Preprocess, name: str) -> ImageSet:
    names = sorted(
        filter(_is_image, files_inside(path, _walk(path))), key=lambda name: name.split("/")
    )
    files = [os.path.join(path, name) for name in names]
    listing = path / "dataset.json"
    _check_regular(listing)
    listed = listing.read_bytes() if listing.exists() else None
    reader = EncodedReader(
        "folder",
        name,
        names,
        lambda i: Path(files[i]).read_bytes(),
        preprocess,
        _labels(names, listed, name),
        check=lambda i: check_file(files[i]),
    )
    return ImageSet(name, "folder", reader)


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as ``os.walk`` does. Follow links to folders, except to a parent folder."""
    for folder, inner, names in os.walk(path, followlinks=True):
        for child in [Path(folder, name) for name in inner]:
            if child.is_symlink():
                target = child.resolve()
                if any(parent.resolve() == target for parent in child.absolute().parents):
                    inner.remove(child.name)
        yield folder, inner, names


def _open_zip(path: Path, preprocess: Preprocess, name: str) -> ImageSet:
    local = threading.local()  # Open one archive per thread: reading moves its file position.

    def fetch(index: int) -> bytes:
        if getattr(local, "process", None) != os.getpid():  # Reopen it after a fork.
            local.process, local.archive = os.getpid(), zipfile.ZipFile(path)
        try:
            return local.archive.read(names[index])
        except zipfile.BadZipFile as error:
            raise BadImage(f"damaged inside the archive ({error})") from None

    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if _is_image(n))
            large = [i.filename for i in archive.infolist() if i.file_size > MAX_BYTES]
            if large:
                raise EvaluationError(f"{name}: {large[0]} is larger than 1 GiB")
            listing = [n for n in archive.namelist() if PurePosixPath(n).name == "dataset.json"]
            listed = archive.read(listing[0]) if listing else None
    except zipfile.BadZipFile:
        raise EvaluationError(f"{name}: not a complete zip (truncated); copy it again") from None
    reader = EncodedReader("zip", name, names, fetch, preprocess, _labels(names, listed, name))
    return ImageSet(name, "zip", reader, path=path)


def _is_image(name: str) -> bool:
    if os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return False
    return not any(part == "__MACOSX" or part.startswith(".") for part in name.split("/"))


def _expand(pattern: str) -> list[Path]:
    """List the files of a brace range (``shards-{000..012}.tar``) or a shell pattern."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match:
        width = len(match[1])
        numbers = range(int(match[1]), int(match[2]) + 1)
        paths = [pattern.replace(match[0], f"{number:0{width}d}") for number in numbers]
    else:
        paths = sorted(glob.glob(pattern))
    missing = [path for path in paths if not Path(path).exists()]
    if not paths or missing:
        raise EvaluationError(f"{pattern}: no such file{f': {missing[0]}' if missing else 's'}")
    return [Path(path) for path in paths]


def _open_tars(paths: list[Path], preprocess: Preprocess, name: str) -> ImageSet:
    """Open WebDataset shards.

    Files of one sample share their name up to the first dot: ``key.png``, ``key.cls``,
    ``key.json``.
    """
    members: list[tuple[int, int, int]] = []  # file, offset, size of each image
    names: list[str] = []
    keys: list[str] = []
    label_of_key: dict[str, int] = {}
    for path in paths:
        _check_regular(path)
    handles = [os.open(path, os.O_RDONLY) for path in paths]
    for number, path in enumerate(paths):
        try:
            with tarfile.open(path, "r:") as archive:
                for info in archive:
                    folder, _, file = info.name.rpartition("/")
                    key, _, extension = file.partition(".")
                    key = f"{number}/{folder}/{key}"
                    if not info.isfile():
                        continue
                    if _is_image(info.name):
                        members.append((number, info.offset_data, info.size))
                        names.append(info.name)
                        keys.append(key)
                    elif extension in ("cls", "json"):
                        data = os.pread(handles[number], info.size, info.offset_data)
                        label = _tar_label(data, extension)
                        if label is not None:
                            label_of_key[key] = label
        except tarfile.ReadError as error:
            raise EvaluationError(f"{path}: not a complete tar ({error}); copy it again") from None

    def fetch(index: int) -> bytes:
        number, offset, size = members[index]
        data = os.pread(handles[number], size, offset)
        if len(data) != size:
            raise BadImage("truncated")
        return data

    values = [label_of_key.get(key, -1) for key in keys]
    labels = values if min(values, default=-1) >= 0 else None
    reader = EncodedReader("tar", name, names, fetch, preprocess, labels, len(paths) > 1)
    return ImageSet(name, "tar", reader, path=paths[0] if len(paths) == 1 else None)


def _tar_label(data: bytes, extension: str) -> int | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if extension == "json":
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    return value if isinstance(value, int) else None


def _labels(names: list[str], listed: bytes | None, set_name: str) -> list[int] | None:
    """Read labels from EDM's dataset.json, or number the first folders of the image paths."""
    if listed is not None:
        try:
            table = dict(json.loads(listed).get("labels") or [])
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise EvaluationError(
                f'{set_name}: dataset.json is not a table {{"labels": [[FILE, LABEL], …]}}; '
                "correct or remove it"
            ) from None
        if not table:
            return None
        missing = [name for name in names if name not in table]
        if missing:
            raise EvaluationError(f"{set_name}: dataset.json has no label for {missing[0]}")
        for name in names:
            if not isinstance(table[name], int | float) or table[name] % 1:
                raise EvaluationError(
                    f"{set_name}: dataset.json has the label {table[name]!r} for {name}; labels "
                    "must be integers"
                )
        return [int(table[name]) for name in names]
    folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    if None in folders or len(set(folders)) < 2:
        return None
    classes = sorted(set(folders), key=str)
    if all(str(folder).isdecimal() for folder in classes):
        return [int(str(folder)) for folder in folders]
    return [classes.index(folder) for folder in folders]
