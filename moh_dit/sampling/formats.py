"""What a finished set can be written as, one image array after another."""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ..errors import UserError

Images = Iterable[np.ndarray]
Writer = Callable[[Path, Images, np.ndarray, Sequence[str] | None], None]


def format_of(output: Path) -> str:
    """The key of ``FORMATS`` for an output path."""
    if output.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"output {output}: a set is written as {known}, not {output.suffix!r}")
    return output.suffix


def write_npz(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """ADM's sample file: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 (N,), uncompressed.

    The arrays pass through one at a time: memory holds a shard, never the set.
    """
    images = iter(images)
    first = next(images)
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *first.shape[1:]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo's own date, 1980: the same images make the same file.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            member.write(np.ascontiguousarray(first).data)
            for array in images:
                member.write(np.ascontiguousarray(array).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
            npy.write_array(member, labels)


FORMATS: dict[str, Writer] = {".npz": write_npz}
