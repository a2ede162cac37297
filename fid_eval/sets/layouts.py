"""Find the labels of images in a folder or archive, from label files or class folders."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import EvaluationError, printable
from .classes import class_order, number_labels, parse_class_names
from .decoding import EXTENSIONS
from .files import Names

CLASS_FILE = "classes.json"
LABEL_FILES = ("dataset.json", "labels.csv", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "file", "filename", "image", "path")
LABEL_COLUMNS = ("label", "class", "class_name", "labels", "category")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def is_image(name: str) -> bool:
    """Return whether a file name has the ending of an image."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Return whether a path within an archive is hidden, or metadata of macOS."""
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))
        for part in name.split("/")
    )


@dataclass
class Skipped:
    """Files that are not part of a set: how many, by reason, and a few of their names."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, hidden: bool) -> None:
        """Count a file."""
        self.counts["hidden" if hidden else "with other endings"] += 1
        if not hidden and len(self.examples) < 3:
            self.examples.append(printable(name))

    def __str__(self) -> str:
        parts = [f"{count:,} {reason}" for reason, count in sorted(self.counts.items())]
        listed = f" ({', '.join(self.examples)})" if self.examples else ""
        return f"skipped files: {', '.join(parts)}{listed}" if parts else ""


@dataclass
class Tree:
    """The files of a folder or archive.

    Attributes:
        where: name in messages.
        names: paths of the images, sorted as bytes.
        rows: number of each image in the object that reads them, int64 (N,).
        tables: paths of label files and class files.
        skipped: the other files.
        read: read a file by its path.
        empty: first folders without images.
        inner: folder to which ``names`` are relative, "" or ending in a slash.
    """

    where: str
    names: Names
    rows: np.ndarray
    tables: set[str]
    skipped: Skipped
    read: Callable[[str], bytes]
    empty: Sequence[str] = ()
    inner: str = ""

    def folders(self) -> dict[str, slice]:
        """Return the first folders of the paths, and the images in each; folders are contiguous."""
        array, found, start = self.names.array, {}, 0
        while start < len(array):
            head, slash, _ = array[start].partition(b"/")
            stop = int(np.searchsorted(array, head + b"0")) if slash else start + 1  # "0" follows /
            if slash:
                found[Names(np.array([head]))[0]] = slice(start, stop)
            start = stop
        return found

    def class_names(self) -> list[str] | None:
        """Return the class names in ``classes.json``; None without this file."""
        if CLASS_FILE not in self.tables:
            return None
        return parse_class_names(self.read(CLASS_FILE), f"{self.where}/{CLASS_FILE}")

    def enter(self, folder: str) -> "Tree":
        """Return the tree of an inner folder.

        Raises:
            EvaluationError: it has no images.
        """
        part = self.folders().get(folder)
        if part is None:
            raise EvaluationError(f"{self.where}: has no images in a folder {printable(folder)}")
        cut = len(folder.encode(errors="surrogateescape")) + 1
        return replace(
            self,
            names=Names(np.array([name[cut:] for name in self.names.array[part]], "S")),
            rows=self.rows[part],
            empty=(),
            tables={t[len(folder) + 1 :] for t in self.tables if t.startswith(f"{folder}/")},
            read=lambda name: self.read(f"{folder}/{name}"),
            inner=f"{self.inner}{folder}/",
        )


@dataclass
class Labels:
    """Labels of images, and the order in which the images are read.

    Attributes:
        order: positions of the images in the tree, int64 (N,).
        labels: int64 (N,), in this order; None without labels.
        class_names: names by label; None if the labels are numbers without names.
        in_folders: the labels number class folders.
        missing: why there are no labels although there are several folders; None otherwise.
        notes: what the user should know.
    """

    order: np.ndarray
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    in_folders: bool = False
    missing: str | None = None
    notes: list[str] = field(default_factory=list)


def enter_split(tree: Tree, is_archive: bool = False) -> Tree:
    """Enter the only folder of an archive, and the split folder if there is only one.

    Raises:
        EvaluationError: there are several splits.
    """
    while True:
        folders = tree.folders()
        images = sum(part.stop - part.start for part in folders.values())
        if tree.tables & {*LABEL_FILES, CLASS_FILE} or images < len(tree.names) or not folders:
            return tree
        if len(folders) > 1 and set(folders) <= SPLITS:
            raise EvaluationError(
                f"{tree.where}: has the splits {', '.join(sorted(folders))}; choose one: "
                f"{tree.where}/{min(folders)}"
            )
        (name, *others) = folders
        if others or not (name in SPLITS or (is_archive and _is_wrapper(tree.enter(name)))):
            return tree
        tree = tree.enter(name)


def _is_wrapper(inner: Tree) -> bool:
    """Return whether a folder only wraps class folders or label files."""
    images = sum(part.stop - part.start for part in inner.folders().values())
    return bool(inner.tables & {*LABEL_FILES, CLASS_FILE}) or images == len(inner.names)


def find_labels(tree: Tree, earlier: Sequence[str] | None = None) -> Labels:
    """Read the labels from a label file, or number the class folders.

    Args:
        tree: the files.
        earlier: class names of an earlier run, in order. They decide if the folders are the same.

    Raises:
        EvaluationError: a label file that is damaged, incomplete or of another tool.
    """
    folders = tree.folders()
    given = tree.class_names()
    tables = [name for name in LABEL_FILES if name in tree.tables]
    if earlier is not None and sorted(earlier) == sorted(folders):
        tables, given = [], list(earlier)
    if len(tables) > 1:
        raise EvaluationError(f"{tree.where}: has {' and '.join(tables)}; remove one of them")
    if tables:
        found = _labels_of_table(tree, tables[0], given)
        if found is not None:
            return found
    order = np.arange(len(tree.names))
    in_folders = sum(part.stop - part.start for part in folders.values())
    if not folders or tables == ["dataset.json"]:
        return Labels(order)
    if in_folders < len(tree.names):
        is_loose = np.char.find(tree.names.array, b"/") < 0
        example = printable(tree.names[int(is_loose.argmax())])
        missing = f"has images outside its class folders, for example {example}"
        return Labels(order, missing=missing, notes=[f"no labels: it {missing}"])
    names = given or class_order(folders)
    if unknown := sorted(set(folders) - set(names)):
        raise EvaluationError(
            f"{tree.where}/{CLASS_FILE} does not name the class folder {printable(unknown[0])}; "
            "it must list all class folders"
        )
    spans = [folders.get(name, slice(0, 0)) for name in names]
    counts = [part.stop - part.start for part in spans]
    notes = []
    if tree.empty:
        first = printable(tree.empty[0])
        notes.append(f"{len(tree.empty)} folders without images are not classes, as {first}")
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        notes.append(f"{len(empty)} classes of {CLASS_FILE} have no images, as {empty[0]}")
    labels = np.repeat(np.arange(len(names)), counts)
    order = np.concatenate([order[part] for part in spans])
    return Labels(order, labels, names, in_folders=True, notes=notes)


def _labels_of_table(tree: Tree, file: str, given: list[str] | None) -> Labels | None:
    """Return the labels in a label file; None if it has no labels, but captions or nothing."""
    where = f"{tree.where}/{file}"
    content = tree.read(file)
    parse = {".json": _parse_edm, ".csv": _parse_csv}.get(file[file.rfind(".") :], _parse_jsonl)
    try:
        table, names = parse(content.decode("utf-8-sig"))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, csv.Error):
        form = (
            'a table {"labels": [[FILE, LABEL], …]}'
            if file == "dataset.json"
            else f"a table with the columns {FILE_COLUMNS[0]} and {LABEL_COLUMNS[0]}"
        )
        raise EvaluationError(f"{where} is not {form}; correct or remove it") from None
    if not table or all(value is None for value in table.values()):
        return None
    images = [name.replace("\\", "/") for name in tree.names]
    if missing := [name for name in images if name not in table]:
        raise EvaluationError(f"{where} has no label for {printable(missing[0])}")
    values = [table[name] for name in images]
    labels, class_names = number_labels(values, images, given, where)
    if given is None and class_names is None and names:
        class_names = [names.get(n, str(n)) for n in range(max(*names, labels.max()) + 1)]
        class_names = class_names if len(set(class_names)) == len(class_names) else None
    extra = len(table.keys() - set(images))
    notes = [f"{file} has labels of {extra:,} files that are missing"] if extra else []
    return Labels(np.arange(len(images)), labels, class_names, notes=notes)


Table = tuple[dict[str, Any], dict[int, str]]  # label by file name, class name by number


def _parse_edm(text: str) -> Table:
    table = dict(json.loads(text)["labels"] or [])
    return {str(name).replace("\\", "/"): value for name, value in table.items()}, {}


def _parse_csv(text: str) -> Table:
    return _parse_rows(list(csv.DictReader(io.StringIO(text, newline=""))))


def _parse_jsonl(text: str) -> Table:
    return _parse_rows([json.loads(line) for line in text.splitlines() if line.strip()])


def _parse_rows(rows: list[dict[str, Any]]) -> Table:
    if not rows:
        return {}, {}
    file = next((name for name in FILE_COLUMNS if name in rows[0]), FILE_COLUMNS[0])
    label = next((name for name in LABEL_COLUMNS if name in rows[0]), None)
    if label is None:
        return {}, {}
    named: dict[int, str] = {}
    if label == "label" and "class" in rows[0]:  # the table of `moh-dit sample`
        pairs = {(str(row["label"]), str(row["class"])) for row in rows}
        named = {int(number): name for number, name in pairs if number.isdecimal()}
    return {str(row[file]).replace("\\", "/"): row[label] for row in rows}, named
