"""List the images of a folder, from disk or from an earlier listing that is still valid."""

import hashlib
import os
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..atomic_write import atomic_path
from ..errors import EvaluationError
from ..saved_references import home
from .decoding import BadImage
from .files import FolderFiles, Names, read_file
from .layouts import CLASS_FILE, LABEL_FILES, Skipped, Tree, is_image

CACHED_FROM = 20_000  # images; smaller folders are listed faster than a listing is worth
LISTING_VERSION = 1
SETTLED = 2_000_000_000  # ns; a folder that has just changed may change again at the same time


@dataclass
class _Walk:
    """What a walk through a folder finds; paths are relative to it."""

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)
    skipped: Skipped = field(default_factory=Skipped)
    folders: dict[str, int] = field(default_factory=dict)  # modification time in ns


def list_folder(path: Path, name: str) -> tuple[Tree, FolderFiles]:
    """List the images of a folder and of the folders in it, and follow links.

    ``name`` is the name of the set in messages.

    Listings of large folders are kept in the user's cache folder. A listing is valid until the
    modification time of a folder changes, which happens when files are added, removed or renamed.
    """
    listing = _listing_file(path)
    found = _load(path, listing)
    if found is None:
        started = time.time_ns()
        walk = _walk(str(path))
        names = Names(walk.names)
        order = np.argsort(names.array, kind="stable")
        found = walk, Names(names.array[order]), np.array(walk.sizes, np.int64)[order]
        if len(names) >= CACHED_FROM and max(walk.folders.values()) < started - SETTLED:
            with suppress(OSError):  # The listing only saves time.
                _save(listing, *found)
    walk, names, sizes = found

    def read(file: str) -> bytes:
        try:
            return read_file(path / file)
        except BadImage as error:
            raise EvaluationError(f"{name}/{file}: is {error}") from None

    tree = Tree(name, names, np.arange(len(names)), walk.tables, walk.skipped, read)
    first = {folder for folder in walk.folders if folder and "/" not in folder}
    tree.empty = sorted(first - tree.folders().keys())
    return tree, FolderFiles(path, names, sizes)


def _walk(root: str) -> _Walk:
    found = _Walk()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        here = os.path.join(root, folder)
        found.folders[folder] = os.stat(here).st_mtime_ns
        prefix = f"{folder}/" if folder else ""
        with os.scandir(here) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name == "__MACOSX":
                    found.skipped.add(prefix + name, hidden=True)
                elif entry.is_dir():
                    if not (entry.is_symlink() and _leads_to_parent(entry.path)):
                        waiting.append(prefix + name)
                elif is_image(name):
                    found.names.append(prefix + name)
                    try:
                        found.sizes.append(entry.stat().st_size)
                    except OSError:  # a link to a missing file
                        found.sizes.append(-1)
                elif name == CLASS_FILE or name in LABEL_FILES:
                    found.tables.add(prefix + name)
                else:
                    found.skipped.add(prefix + name, hidden=False)
    return found


def _leads_to_parent(folder: str) -> bool:
    """Return whether a link leads to one of its parents, which would be walked forever."""
    target = Path(folder).resolve()
    return any(parent.resolve() == target for parent in Path(folder).absolute().parents)


def _listing_file(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return home() / "listings" / f"{name}.npz"


def _save(file: Path, walk: _Walk, names: Names, sizes: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary, temporary.open("wb") as opened:
        np.savez(
            opened,
            version=LISTING_VERSION,
            names=names.array,
            sizes=sizes,
            tables=Names(sorted(walk.tables)).array,
            folders=Names(walk.folders).array,
            times=np.array(list(walk.folders.values()), np.int64),
            reasons=Names(walk.skipped.counts).array,
            counts=np.array(list(walk.skipped.counts.values()), np.int64),
            examples=Names(walk.skipped.examples).array,
        )


def _load(path: Path, file: Path) -> tuple[_Walk, Names, np.ndarray] | None:
    """Return an earlier listing, or None if there is none or a folder has changed since."""
    try:
        with np.load(file) as stored:
            if stored["version"] != LISTING_VERSION:
                return None
            folders = list(Names(stored["folders"]))
            now = [os.stat(path / folder).st_mtime_ns for folder in folders]
            if now != stored["times"].tolist():
                return None
            reasons = zip(Names(stored["reasons"]), stored["counts"].tolist(), strict=True)
            skipped = Skipped(examples=list(Names(stored["examples"])))
            skipped.counts.update(dict(reasons))
            tables = set(Names(stored["tables"]))
            walk = _Walk(
                tables=tables, skipped=skipped, folders=dict(zip(folders, now, strict=True))
            )
            return walk, Names(stored["names"]), stored["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or damaged
        return None
