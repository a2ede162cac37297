"""Write a data set as an ADM-format ``.npz`` file, the reference of an evaluation.

Images are preprocessed as for training, and not mirrored.
"""

import zipfile
from pathlib import Path

import numpy as np

from fid_eval.progress import progress_bar

from ..common.atomic_write import atomic_output
from ..common.paths import require_new_output
from .config import ExportConfig
from .images import (
    ImageSet,
    conversions_of,
    index_batches,
    open_images,
    print_conversions,
    read_batches,
)


def export_npz(config: ExportConfig) -> None:
    """Write the data set to ``config.output``, holding one batch in memory at a time.

    Raises:
        UserError: bad data, or an output that exists or does not end in ``.npz``.
    """
    config.check_paths()
    images = open_images(config.data, config.image_size, skip_unreadable=config.skip_unreadable)
    output = Path(config.output)
    with atomic_output(output) as aside:
        _write_npz(aside, images, config.num_workers)
        require_new_output(output)  # another program may have written it meanwhile
    print_conversions(config.data, [conversions_of(images)])
    size = config.image_size
    print(
        f"wrote {output}: {len(images)} images of {size}×{size} pixels, "
        f"{len(images.class_names)} classes"
    )


def _write_npz(path: Path, images: ImageSet, num_workers: int) -> None:
    """Write the arrays into an uncompressed zip file, as ``numpy.savez`` does, batch by batch."""
    shape = (len(images), images.image_size, images.image_size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w") as archive,
        progress_bar(len(images), desc="exporting", unit="img") as progress,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for batch, _ in read_batches(
                images, index_batches(range(len(images)), 64), num_workers
            ):
                member.write(batch.tobytes())
                progress.update(len(batch))
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(images.labels, np.int64))
