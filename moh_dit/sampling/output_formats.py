"""What a finished set can be written as, one image array after another.

Memory holds a shard, never the set; the same images make the same bytes.
"""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from ..common.errors import UserError

Images = Iterable[np.ndarray]
Writer = Callable[[Path, Images, np.ndarray, Sequence[str] | None], None]


def format_of(output: Path) -> str:
    """The key of ``FORMATS`` for an output path."""
    if output.suffix not in FORMATS:
        raise UserError(
            f"output {output}: a set is written as .npz, .tar or a folder (a name without a "
            f"suffix), not {output.suffix!r}"
        )
    return output.suffix


def write_npz(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """ADM's sample file: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 (N,), uncompressed."""
    images = iter(images)
    first = next(images)
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *first.shape[1:]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo's own date is 1980, whenever this runs.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            member.write(np.ascontiguousarray(first).data)
            for array in images:
                member.write(np.ascontiguousarray(array).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
            npy.write_array(member, labels)


def write_folder(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """``000000000.png`` … in the order of the set, and ``labels.csv`` (file, label, class)."""
    path.mkdir()
    names = [f"{index:09d}.png" for index in range(len(labels))]
    for name, png in zip(names, encoded(images), strict=True):
        (path / name).write_bytes(png)
    with (path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "class"])
        for name, label in zip(names, labels.tolist(), strict=True):
            table.writerow([name, label, class_names[label] if class_names else label])


def write_tar(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """WebDataset: ``000000000.png`` and ``000000000.cls`` (the label as text) for each image."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, (png, label) in enumerate(zip(encoded(images), labels.tolist(), strict=True)):
            for suffix, content in (("png", png), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def encoded(images: Images) -> Iterator[bytes]:
    """Each image as PNG, a shard's at once on several threads."""
    with ThreadPoolExecutor() as pool:
        for array in images:
            yield from pool.map(to_png, array)


def to_png(image: np.ndarray) -> bytes:
    """One uint8 (H, W, 3) image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


FORMATS: dict[str, Writer] = {".npz": write_npz, ".tar": write_tar, "": write_folder}
