"""Write sheets, animations and sets of images. Nothing here imports torch.

Sets are written one array of images after another, so memory does not grow with the size of the
set. The same images always produce the same bytes.
"""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fid_eval.csv_cells import plain_cell

from ..common.errors import UserError

Images = Iterable[np.ndarray]
Writer = Callable[[Path, Images, np.ndarray, Sequence[str] | None], None]
ANIMATIONS = (".gif", ".webp", ".mp4")
FRAME_MS, LAST_FRAME_MS = 120, 1500


def settings_path(output: Path) -> Path:
    """Return the path of the YAML file with the settings of ``output``."""
    return output.with_name(output.name + ".yaml")


def partial_folder(output: Path) -> Path:
    """Return the folder that holds the images of an unfinished set."""
    return output.with_name(output.name + ".partial")


def has_unfinished_set(output: Path) -> bool:
    """Return whether sampling of the set ``output`` has started but not finished."""
    return (partial_folder(output) / "settings.json").is_file()


def check_set_output(output: Path, resume: bool) -> None:
    """Raise ``UserError`` unless a set can be started, or resumed, at ``output``."""
    if output.suffix not in FORMATS:
        raise UserError(
            f"output {output}: a set is written as .npz, .tar or a folder (a name without a "
            f"suffix), not {output.suffix!r}"
        )
    partial = partial_folder(output)
    if has_unfinished_set(output):
        if not resume:
            raise UserError(
                f"{partial} holds an unfinished set; continue it with --resume, delete it, or give "
                "another output"
            )
    elif any(not file.name.startswith(".") for file in partial.glob("*")):
        raise UserError(f"{partial} is not an unfinished set; move it or give another output")


def write_npz(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """Write ADM's sample file, uncompressed: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` int64 (N,)."""
    images = iter(images)
    first = next(images)
    header = dict(descr="|u1", fortran_order=False, shape=(len(labels), *first.shape[1:]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # ZipInfo defaults to a fixed date, so the bytes do not depend on the time of writing.
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
    """Write ``000000000.png`` … in order, and ``labels.csv`` with columns file, label, class."""
    path.mkdir()
    names = [f"{index:09d}.png" for index in range(len(labels))]
    for name, png in zip(names, encode_pngs(images), strict=True):
        (path / name).write_bytes(png)
    with (path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "class"])
        for name, label in zip(names, labels.tolist(), strict=True):
            table.writerow([name, label, plain_cell(class_names[label]) if class_names else label])


def write_tar(
    path: Path, images: Images, labels: np.ndarray, class_names: Sequence[str] | None
) -> None:
    """Write a WebDataset shard: ``000000000.png`` and ``000000000.cls`` (the label) per image."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        labelled = zip(encode_pngs(images), labels.tolist(), strict=True)
        for index, (png, label) in enumerate(labelled):
            for suffix, content in (("png", png), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def encode_pngs(images: Images) -> Iterator[bytes]:
    """Encode each image as PNG, the images of one array in parallel."""
    with ThreadPoolExecutor() as pool:
        for array in images:
            yield from pool.map(to_png, array)


def to_png(image: np.ndarray) -> bytes:
    """Encode one uint8 (H, W, 3) image as PNG."""
    return encode_image(Image.fromarray(np.ascontiguousarray(image)), "PNG")


def encode_image(image: Image.Image, format: str, **options: Any) -> bytes:
    """Encode an image in a format of Pillow, with the options of ``Image.save``."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


FORMATS: dict[str, Writer] = {".npz": write_npz, ".tar": write_tar, "": write_folder}


def encode_sheet(sheet: Image.Image, settings: str) -> bytes:
    """Encode a PNG with its settings in the text chunk ``settings``, which ``--config`` reads."""
    text = PngInfo()
    text.add_itxt("settings", settings)
    return encode_image(sheet, "PNG", pnginfo=text)


def check_animation(output: Path) -> None:
    """Raise ``UserError`` if ``output`` is an MP4 and the packages to write it are missing."""
    if output.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise UserError(
                f"output {output}: MP4 needs pip install imageio imageio-ffmpeg; .gif and .webp "
                "need no further package"
            ) from None


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as ``.gif``, ``.webp`` or ``.mp4``; the last frame is shown longer."""
    if path.suffix == ".mp4":
        from imageio.v2 import mimwrite

        last = [frames[-1]] * (LAST_FRAME_MS // FRAME_MS)
        # The codec requires an even width and height.
        even = [np.asarray(f)[: f.height // 2 * 2, : f.width // 2 * 2] for f in [*frames, *last]]
        mimwrite(path, even, format="mp4", fps=1000 / FRAME_MS, macro_block_size=2)  # type: ignore[arg-type]
        return
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    options: dict[str, Any] = dict(
        append_images=frames[1:], duration=durations, loop=0, lossless=True
    )
    frames[0].save(path, save_all=True, **options)  # GIF ignores ``lossless``
