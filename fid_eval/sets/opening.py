"""Open a set of images: a path, an array, a Hugging Face data set or an iterable of batches."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import EvaluationError, describe_error, printable
from .archives import TAR_ENDINGS, expand_tars, list_tars, list_zip
from .classes import number_labels
from .decoding import AS_IS, Preprocess
from .encoded import EncodedReader
from .files import Files
from .folders import list_folder
from .hugging_face import import_datasets, is_hub_url, is_saved_dataset, open_dataset, open_hub
from .image_set import ImageSet
from .layouts import Labels, Tree, enter_split, find_labels
from .readers import ArrayReader, IterableReader, Share
from .stored_arrays import open_npz, open_safetensors


def open_set(
    source: Any,
    preprocess: Preprocess = AS_IS,
    name: str | None = None,
    check_headers: bool = True,
    earlier_classes: Sequence[str] | None = None,
) -> ImageSet:
    """Open a path, array, tensor, Hugging Face data set or iterable of batches as an ImageSet.

    Args:
        source: the set.
        preprocess: conversion of each image to pixels.
        name: name of the set in messages and results.
        check_headers: read the headers of all images, which counts conversions and finds their
            size. The images are decoded later.
        earlier_classes: class names of an earlier run, whose order is kept if the class folders
            are the same.

    Raises:
        EvaluationError: the set is missing, empty or truncated, or its images differ in size.
    """
    if isinstance(source, ImageSet):
        return source
    opened = _open(source, preprocess, name, earlier_classes)
    if check_headers and isinstance(opened.images, EncodedReader):
        opened.images.check_headers()
    return opened


def _open(
    source: Any, preprocess: Preprocess, name: str | None, earlier_classes: Sequence[str] | None
) -> ImageSet:
    if isinstance(source, str | Path):
        path = str(source)
        name = printable(name or path)
        try:
            return _open_path(path, preprocess, name, earlier_classes)
        except EvaluationError:
            raise
        except Exception as error:  # Packages raise many types for foreign or damaged files.
            raise EvaluationError(f"{name}: cannot be read: {describe_error(error)}") from error
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


def _open_path(
    path: str, preprocess: Preprocess, name: str, earlier: Sequence[str] | None
) -> ImageSet:
    if is_hub_url(path):
        return open_hub(path, preprocess, name)
    location, inner = _split_path(Path(path).expanduser())
    if not os.path.exists(location):
        if any(c in path for c in "*?[{"):
            return _open_tars(expand_tars(path), preprocess, name)
        raise EvaluationError(f"{path}: no such file or folder")
    if location.is_dir():
        if is_saved_dataset(location):
            opened = open_dataset(import_datasets().load_from_disk(path), preprocess, name)
        else:
            opened = _open_folder(location, preprocess, name, earlier)
        opened.path = location
        return opened
    _check_regular(location)
    lower = location.name.lower()
    if lower.endswith(".zip"):
        tree, files = list_zip(location, name)
        tree = enter_split(_enter(tree, inner), is_archive=True)
        whole = None if inner else location  # A part of an archive is hashed image by image.
        return _open_listed("zip", tree, files, find_labels(tree, earlier), preprocess, whole)
    if lower.endswith(TAR_ENDINGS):
        return _open_tars([location], preprocess, name, inner)
    if lower.endswith(".npz"):
        return open_npz(location, preprocess, name)
    if lower.endswith(".safetensors"):
        return open_safetensors(location, name)
    if lower.endswith(".npy"):
        try:
            array = np.load(location, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise EvaluationError(f"{name}: not a complete .npy of images ({error})") from None
        return ImageSet(name, "npy", ArrayReader(array, name, preprocess), path=location)
    raise EvaluationError(
        f"{path}: not a set of images: give a folder, .npz, .npy, .zip, .tar or .safetensors"
    )


def _split_path(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Split the path of a folder within an archive into the archive and the folder."""
    if not os.path.exists(path):
        for parent in path.parents:
            if parent.name.lower().endswith((".zip", *TAR_ENDINGS)) and parent.is_file():
                return parent, path.relative_to(parent).parts
    return path, ()


def _enter(tree: Tree, folders: tuple[str, ...]) -> Tree:
    for folder in folders:
        tree = tree.enter(folder)
    return tree


def _check_regular(path: Path) -> None:
    """Raise if ``path`` is a FIFO, socket or device, because reading it may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise EvaluationError(f"{path}: is not a regular file")


def _open_folder(
    path: Path, preprocess: Preprocess, name: str, earlier: Sequence[str] | None
) -> ImageSet:
    tree, files = list_folder(path, name)
    if not len(tree.names):
        tars = sorted(file for file in path.iterdir() if file.name.lower().endswith(TAR_ENDINGS))
        if tars:
            return _open_tars(tars, preprocess, name)
    if earlier is None or set(earlier) != set(tree.folders()):
        tree = enter_split(tree)
    return _open_listed("folder", tree, files, find_labels(tree, earlier), preprocess, path)


def _open_tars(
    paths: Sequence[Path], preprocess: Preprocess, name: str, inner: tuple[str, ...] = ()
) -> ImageSet:
    """Open WebDataset shards; without labels, folders in the archives are the classes."""
    for path in paths:
        _check_regular(path)
    tree, files, values, notes = list_tars(paths, name, preprocess.strict)
    tree = _enter(tree, inner)
    if values is None:
        tree = enter_split(tree, is_archive=True)
        found = find_labels(tree)
    else:
        found = Labels(np.argsort(tree.rows))  # the order of the samples
        items = [files.names[row] for row in tree.rows[found.order]]
        values = [values[row] for row in tree.rows[found.order]]
        found.labels, found.class_names = number_labels(values, items, tree.class_names(), name)
    found.notes += notes
    is_whole = len(paths) == 1 and not inner
    return _open_listed("tar", tree, files, found, preprocess, paths[0] if is_whole else None)


def _open_listed(
    kind: str, tree: Tree, files: Files, found: Labels, preprocess: Preprocess, path: Path | None
) -> ImageSet:
    is_one_class = found.class_names is not None and len(found.class_names) == 1
    labels = None if is_one_class and found.in_folders else found.labels
    reader = EncodedReader(
        kind,
        tree.where,
        files,
        preprocess,
        labels,
        tree.rows[found.order],
        hash_images=path is None,
    )
    inside = [f"reads its folder {printable(tree.inner[:-1])}"] if tree.inner else []
    return ImageSet(
        tree.where,
        kind,
        reader,
        path=path,
        class_names=found.class_names,
        in_folders=found.in_folders,
        missing_labels=found.missing,
        skipped=tree.skipped,
        notes=inside + found.notes,
    )
