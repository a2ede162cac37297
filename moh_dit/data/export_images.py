"""Write any data set as an ADM-format ``.npz``, the reference that an evaluation compares with.

    python -m moh_dit.data.export_images --data digits --image_size 32 --output digits.npz

Images are preprocessed exactly as training sees them (unflipped).
"""

import os
import tempfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ..common.errors import UserError
from ..common.progress import progress_bar
from .config import ExportConfig
from .images import ImageSet, open_images, read_batches


def export_npz(config: ExportConfig) -> None:
    """Stream the data set into ``config.output``; memory holds one batch at a time.

    Raises:
        UserError: bad data, an output that exists or does not end in ``.npz``.
    """
    output = Path(config.output)
    if output.suffix != ".npz":
        raise UserError(f"output {output} must end in .npz")
    if output.exists():
        raise UserError(f"output {output} exists: give a new name or move it away")
    images = open_images(config.data, config.image_size, skip_unreadable=config.skip_unreadable)
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{output.stem}.", suffix=".npz", dir=output.parent)
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _write_npz(file, images, config.num_workers)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o644)
        if output.exists():
            raise UserError(f"output {output} appeared meanwhile: give a new name")
        aside.rename(output)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {output}: {len(images)} images of {len(images.class_names)} classes")


def _write_npz(file: IO[bytes], images: ImageSet, num_workers: int) -> None:
    shape = (len(images), images.image_size, images.image_size, 3)
    batches = [range(i, min(i + 64, len(images))) for i in range(0, len(images), 64)]
    with (
        zipfile.ZipFile(file, "w", allowZip64=True) as archive,
        progress_bar(len(images), desc="exporting", unit="img") as progress,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _npy_header(member, shape, np.dtype(np.uint8))
            for batch, _ in read_batches(images, batches, num_workers):
                member.write(batch.tobytes())
                progress.update(len(batch))
        with archive.open("arr_1.npy", "w") as member:
            _npy_header(member, (len(images),), np.dtype(np.int64))
            member.write(np.ascontiguousarray(images.labels, np.int64).tobytes())


def _npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        file,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
