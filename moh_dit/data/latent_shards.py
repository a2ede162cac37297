"""Write the files of a set of latents, so that an interrupted encoding can continue.

    encoding.json                 plan: all settings that determine the latents
    moments-….npy                 moments of consecutive images, (1 or 2, n, 2C, h, w)
    moments-….npy.json            labels and checksums of the shard, written before the shard
    moments.crc32.npy             checksum of each record, written at the end
    index.json, labels.npy        written last, from all of the above

Every write is atomic: a file with its final name is complete. After an interruption, only
unfinished shards are encoded again. The plan and the ``.npy.json`` files are removed at the end.
An encoding that version 0.1.0 started is finished in format 1.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic_write import atomic_write
from ..common.errors import UserError
from ..common.paths import holds_files, require_new_output
from .latent_index import (
    INDEX_FILE,
    LABELS_FILE,
    MOMENTS,
    PLAN_FILE,
    content_hash,
    read_index,
    to_format_2,
)

FORMAT = 2
SHARD_PREFIX = f"{MOMENTS}-"
LAYOUT = ("images_per_shard", "images_per_pass")  # kept when an encoding continues


def check_latents_output(folder: Path, resume: bool) -> None:
    """Raise ``UserError`` if ``folder`` is finished, or exists although ``resume`` is not set."""
    if (folder / INDEX_FILE).exists():
        with suppress(UserError):  # a damaged index is reported when the latents are opened
            _remove_temporary_files(folder)  # the encoding may have been killed while it did so
        raise UserError(f"latents {folder} are already finished: give another name")
    if not resume and (folder / PLAN_FILE).exists():
        raise UserError(
            f"output {folder} is an unfinished encoding: continue it with --resume, or give "
            "another name"
        )
    if not resume and (holds_files(folder) or folder.is_file()):
        require_new_output(folder)


def prepare_folder(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Create the folder of new latents, or continue one that was started with the same plan.

    Returns:
        The plan to follow. It has the format and the layout with which the encoding was started.

    Raises:
        UserError: the folder was started with another plan, or contains other files.
    """
    if (folder / PLAN_FILE).is_file():
        plan = _continue_plan(folder, plan)
    elif holds_files(folder):
        raise UserError(f"output folder {folder} contains other files: give another name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / PLAN_FILE, json.dumps(plan, indent=2).encode() + b"\n")
    return plan


def earlier_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of an unfinished encoding, empty if there is none."""
    file = folder / PLAN_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _continue_plan(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    earlier = earlier_plan(folder)
    if earlier["format"] == 1:
        plan = _to_format_1(plan)
    plan = {**plan, **{name: earlier[name] for name in LAYOUT if name in earlier}}
    earlier["autoencoder"]["name"] = plan["autoencoder"]["name"]  # its weights are compared
    if earlier["data"]["fingerprint"] == plan["data"]["fingerprint"]:
        earlier["data"] = plan["data"]
    if different := [key for key in {**earlier, **plan} if earlier.get(key) != plan.get(key)]:
        raise UserError(
            f"latents {folder} were started with other settings ({', '.join(different)} differ): "
            "use the same settings, or give another name"
        )
    return plan


def _to_format_1(plan: dict[str, Any]) -> dict[str, Any]:
    moments, autoencoder = plan["arrays"][MOMENTS], plan["autoencoder"]
    kept = ["num_images", "image_size", "flipped", "tf32", "images_per_shard", "data",
            "class_names"]  # fmt: skip
    if plan["mixed_precision"] != "no":  # version 0.1.0 had no such setting
        kept.append("mixed_precision")
    return {
        "format": 1,
        **{name: plan[name] for name in kept},
        "moments_shape": moments["shape"],
        "dtype": moments["dtype"],
        "autoencoder": {
            name: autoencoder[name] for name in ("identity", "name", "factor", "shift")
        },
    }


def write_latent_shard(path: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    """Write the moments of n images, (1 or 2, n, 2C, h, w), and their labels, int64 (n,)."""
    content = io.BytesIO()
    np.save(content, moments)
    data = content.getbuffer()
    metadata = {
        "labels": labels.tolist(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "crc32": [[zlib.crc32(record) for record in view] for view in moments],
    }
    # The metadata is written first, so a complete shard always has metadata.
    write_file(_metadata_path(path), json.dumps(metadata).encode())
    write_file(path, data)


def _metadata_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def write_index(folder: Path, plan: dict[str, Any], names: Iterable[str]) -> int:
    """Write the index of the shards with these file names, and return the number of images."""
    found = [(name, json.loads(_metadata_path(folder / name).read_text())) for name in names]
    found = [(name, data) for name, data in found if data["labels"]]  # some image was readable
    labels = np.array([label for _, data in found for label in data["labels"]], np.int64)
    _write_array(folder / LABELS_FILE, labels)
    index: dict[str, Any] = {**plan, "num_images": len(labels), "shards": []}
    for name, data in found:
        file = {"file": name, "sha256": data["sha256"]}
        entry = file if plan["format"] == 1 else {"arrays": {MOMENTS: file}}
        index["shards"].append({"num_images": len(data["labels"]), **entry})
    if plan["format"] > 1:
        no_images = np.empty((1 + plan["flipped"], 0), np.uint32)
        records = [np.array(data["crc32"], np.uint32) for _, data in found]
        name = f"{MOMENTS}.crc32.npy"
        digest = _write_array(folder / name, np.concatenate([no_images, *records], axis=1))
        checksums = {"file": name, "sha256": digest}
        index["arrays"] = {MOMENTS: {**plan["arrays"][MOMENTS], "crc32": checksums}}
    index["content_hash"] = content_hash(to_format_2(index), labels)
    write_file(folder / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")
    _remove_temporary_files(folder)
    return len(labels)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write an ``.npy`` file and return its SHA-256."""
    content = io.BytesIO()
    np.save(content, array)
    write_file(path, content.getbuffer())
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _remove_temporary_files(folder: Path) -> None:
    """Remove the files that only an unfinished encoding needs; the index must exist."""
    kept = {shard["arrays"][MOMENTS]["file"] for shard in read_index(folder)["shards"]}
    for path in (folder / PLAN_FILE, *folder.glob(f"{SHARD_PREFIX}*"), *folder.glob("*.done")):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically; raise ``UserError`` if the disk is full or not writable."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): finished shards are kept; solve the "
            "problem, then run the command again with --resume"
        ) from None
