"""List the images of zip archives and of tar archives (WebDataset shards)."""

import atexit
import bz2
import gzip
import json
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EvaluationError, describe_error, printable
from .decoding import MAX_BYTES
from .files import Names, TarFiles, ZipFiles, read_file
from .layouts import CLASS_FILE, LABEL_FILES, Skipped, Tree, is_hidden, is_image

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
LABELS = (".cls", ".json")  # members with the label of a sample
BLOCK = 512  # of a tar; two blocks of zeros end it


def list_zip(path: Path, name: str) -> tuple[Tree, ZipFiles]:
    """List a zip archive.

    Raises:
        EvaluationError: a truncated archive, or a member that is encrypted, too large or
            compressed by an unknown method.
    """
    images: dict[str, int] = {}
    members, tables, skipped = {}, set(), Skipped()
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile:
        raise EvaluationError(f"{name}: not a complete zip (truncated); copy it again") from None
    for info in infos:
        member = _normalize(info.filename)
        is_table = posixpath.basename(member) in (CLASS_FILE, *LABEL_FILES)
        if info.is_dir():
            continue
        if is_hidden(member) or not (is_table or is_image(member)):
            skipped.add(member, is_hidden(member))
            continue
        where = f"{name}: {printable(member)}"
        if info.flag_bits & 1:
            raise EvaluationError(f"{where} is encrypted; decrypt the archive first")
        if info.compress_type not in METHODS:
            raise EvaluationError(
                f"{where} has the compression method {info.compress_type}, which is not "
                "supported; write the archive with deflate or without compression"
            )
        if info.file_size > MAX_BYTES:
            raise EvaluationError(f"{where} is larger than 1 GiB")
        members[member] = info.filename
        if is_table:
            tables.add(member)
        else:
            images[member] = info.file_size

    def read(member: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(members[member])

    ordered = sorted(images, key=os.fsencode)
    files = ZipFiles(
        path,
        Names(members[member] for member in ordered),
        np.array([images[member] for member in ordered], np.int64),
    )
    return Tree(name, Names(ordered), np.arange(len(ordered)), tables, skipped, read), files


def _normalize(member: str) -> str:
    return member.replace("\\", "/").removeprefix("./")


def expand_tars(pattern: str) -> list[Path]:
    """List the tar archives that a pattern names.

    Args:
        pattern: a shell pattern, with any number of ranges such as ``{000..127}``. An existing
            path is not treated as a pattern.

    Raises:
        EvaluationError: no archive matches, or one of a range does not exist.
    """
    found: list[Path] = []
    for name in _expand_ranges(pattern):
        matching = [name] if os.path.exists(name) else sorted(glob(name))
        matching = [match for match in matching if match.endswith(TAR_ENDINGS)]
        if not matching:
            missing = "s" if name == pattern else f": {name}"
            raise EvaluationError(f"{pattern}: no such file{missing}")
        found += map(Path, matching)
    return found


def _expand_ranges(pattern: str) -> Iterator[str]:
    """Yield ``pattern`` once for each number of its ranges ``{000..127}``, in order."""
    found = re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", pattern, re.DOTALL)
    if found is None:
        yield pattern
        return
    before, first, last, after = found.groups()
    if int(first) > int(last):
        raise EvaluationError(f"{pattern}: the first number {first} is more than the last, {last}")
    for number in range(int(first), int(last) + 1):
        yield from _expand_ranges(f"{before}{number:0{len(first)}}{after}")


@dataclass
class _Shards:
    """What has been found in tar archives so far, with the images in the order of the samples."""

    names: list[str] = field(default_factory=list)
    locations: list[tuple[int, int, int]] = field(default_factory=list)  # archive, offset, size
    labels: list[Any] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Sample:
    """The members of a WebDataset sample: images, and labels by the stem of their file name."""

    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)


def list_tars(
    paths: Sequence[Path], name: str, strict: bool = False
) -> tuple[Tree, TarFiles, list[Any] | None, list[str]]:
    """List WebDataset shards.

    The files of a sample share their path up to the first dot of the file name, wherever they lie
    in the archive: ``key.png`` with ``key.cls`` or ``key.json``. If several images of a sample have
    a label of their own (``key.1.png`` with ``key.1.cls``), each is a sample.

    Args:
        paths: the archives.
        name: name of the set in messages.
        strict: raise if an archive has no end mark.

    Returns:
        The images as a tree and in the order of the samples, the label of each sample (None if no
        sample has one), and notes on what was found.

    Raises:
        EvaluationError: a damaged archive, a link to a missing member, or a sample without a label
            although others have one.
    """
    found, class_file = _Shards(), paths[0].parent / CLASS_FILE
    paths = [_decompressed(path, name) for path in paths]
    repeated = 0
    several: list[str] = []
    for number, path in enumerate(paths):
        samples: dict[str, _Sample] = {}
        for member, target, data in _members(path, name, found, strict):
            folder, file = posixpath.split(_normalize(member))
            stem, ending = posixpath.splitext(file)
            ending = ending.lower()
            sample = samples.setdefault(posixpath.join(folder, file.split(".", 1)[0]), _Sample())
            if is_image(file):
                repeated += member in sample.images
                sample.images[member] = (number, target.offset_data, target.size)
            elif (label := _label(data, ending, f"{name}: {printable(member)}")) is not None:
                sample.labels[stem] = label
        is_labelled = any(sample.labels for sample in samples.values())
        for sample in samples.values():
            for member, label in _images_of(sample, is_labelled, several):
                found.names.append(member)
                found.locations.append(sample.images[member])
                found.labels.append(label)
    if repeated:
        found.notes.append(f"{repeated:,} members are stored twice; the last one counts")
    if several:
        found.notes.append(f"{len(several):,} samples have several images; {several[0]}")
    without = [n for n, label in zip(found.names, found.labels, strict=True) if label is None]
    if 0 < len(without) < len(found.labels):
        raise EvaluationError(
            f"{name}: {printable(without[0])} has no label; add a .cls file with the same name, or "
            'a .json file that contains "label"'
        )
    plain = Names(map(_normalize, found.names))
    rows = np.argsort(plain.array, kind="stable")
    tables = {CLASS_FILE} if class_file.is_file() else set()
    tree = Tree(name, plain[rows], rows, tables, found.skipped, lambda _: read_file(class_file))
    locations = np.array(found.locations, np.int64).reshape(-1, 3)
    files = TarFiles(paths, Names(found.names), locations)
    return tree, files, None if without else found.labels, found.notes


def _images_of(sample: _Sample, is_labelled: bool, several: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the images of a sample that count, with their labels."""
    stems = {member: posixpath.splitext(posixpath.basename(member))[0] for member in sample.images}
    are_samples = len(set(stems.values())) == len(stems) > 1
    if not is_labelled or (are_samples and set(stems.values()) <= sample.labels.keys()):
        yield from ((member, sample.labels.get(stem)) for member, stem in stems.items())
    elif stems:
        # The ending with the fewest dots: 1.png rather than 1.mask.png.
        first = min(stems, key=lambda member: posixpath.basename(member).count("."))
        if len(stems) > 1:
            other = next(member for member in stems if member != first)
            several.append(f"{printable(first)} counts and not {printable(other)}")
        yield first, sample.labels.get(stems[first], next(iter(sample.labels.values()), None))


def _members(
    path: Path, name: str, found: _Shards, strict: bool
) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """Yield the name of each file or link, its target, and the content of labels."""
    last = None
    by_name: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for last in archive:
                member, is_label = _normalize(last.name), last.name.lower().endswith(LABELS)
                if last.isdir():
                    continue
                if is_hidden(member) or not (is_label or is_image(member)):
                    found.skipped.add(member, is_hidden(member))
                    continue
                if (last.issym() or last.islnk()) and not by_name:
                    by_name = {posixpath.normpath(m.name): m for m in archive.getmembers()}
                target = _target(last, by_name, name)
                if not target.isreg() or target.issparse():
                    raise EvaluationError(
                        f"{name}: {printable(last.name)} is not a regular file; pack it as one"
                    )
                opened = archive.extractfile(target) if is_label else None
                content = b"" if opened is None else opened.read()
                yield last.name, target, content
            end, size = archive.offset, os.path.getsize(path)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise EvaluationError(
            f"{name}: {path} is not a complete tar ({describe_error(error)}); copy it again"
        ) from None
    if size - end < BLOCK and last is not None:
        text = f"{path.name} has no end mark, so members after {printable(last.name)} may be lost"
        if strict:
            raise EvaluationError(f"{name}: {text}; copy it again, or leave out --strict")
        found.notes.append(text)


def _target(
    member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo], name: str
) -> tarfile.TarInfo:
    """Follow a link to a member of the same archive."""
    target = member
    for _ in range(8):
        if not (target.issym() or target.islnk()):
            return target
        folder = posixpath.dirname(target.name) if target.issym() else ""
        linked = posixpath.normpath(posixpath.join(folder, target.linkname))
        if linked not in by_name:
            break
        target = by_name[linked]
    raise EvaluationError(
        f"{name}: {printable(member.name)} links to {printable(target.linkname)}, which is not in "
        "the archive; pack it with --dereference"
    )


def _label(content: bytes, ending: str, where: str) -> Any:
    """Return the label in a .cls or .json member; None if it has none."""
    try:
        text = content.decode("utf-8-sig").strip()
        if ending == ".cls":
            return text
        value = json.loads(text)
    except UnicodeDecodeError:
        raise EvaluationError(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise EvaluationError(f"{where} is not JSON; correct or remove it") from None
    return value.get("label", value.get("cls")) if isinstance(value, dict) else None


def _decompressed(path: Path, name: str) -> Path:
    """Return a tar itself, or a decompressed copy of it, which is deleted when the program ends."""
    with path.open("rb") as file:
        opener: Any = OPENERS.get(file.read(2))
    if opener is None:
        return path
    folder = Path(tempfile.mkdtemp(prefix="fid-eval-"))
    atexit.register(_remove_copy, folder, os.getpid())
    try:
        with opener(path, "rb") as packed, (folder / path.name).open("wb") as copy:
            shutil.copyfileobj(packed, copy, 1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise EvaluationError(
            f"{name}: {path} cannot be decompressed ({describe_error(error)}); copy it again, or "
            "set TMPDIR to a folder with enough space"
        ) from None
    return folder / path.name


def _remove_copy(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # Forked workers run this function, too.
        shutil.rmtree(folder, ignore_errors=True)
