"""Write the files of a set of latents, so that an interrupted encoding can continue.

    encoding.json                 plan: all settings that determine the latents
    moments-….npy                 moments of consecutive images, (1 or 2, n, 2C, h, w)
    moments-….npy.json            labels and SHA-256 of the shard, written before the shard
    index.json, labels.npy        written last, from all of the above

Every write is atomic: a file with its final name is complete. After an interruption, only
unfinished shards are encoded again. The plan and the ``.npy.json`` files are removed at the end.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic_write import atomic_write
from ..common.errors import UserError
from ..common.paths import holds_files, require_new_output

FORMAT = 1
INDEX_FILE = "index.json"
PLAN_FILE = "encoding.json"
LABELS_FILE = "labels.npy"
SHARD_PREFIX = "moments-"


def check_latents_output(folder: Path, resume: bool) -> None:
    """Raise ``UserError`` if ``folder`` is finished, or exists although ``resume`` is not set."""
    if (folder / INDEX_FILE).exists():
        _remove_temporary_files(folder)  # in case the encoding was killed while it removed them
        raise UserError(f"latents {folder} are already finished: give another name")
    if not resume and (folder / PLAN_FILE).exists():
        raise UserError(
            f"output {folder} is an unfinished encoding: continue it with --resume, or give "
            "another name"
        )
    if not resume and (holds_files(folder) or folder.is_file()):
        require_new_output(folder)


def prepare_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Create the folder of new latents, or continue one that was started with the same plan.

    Raises:
        UserError: the folder was started with another plan, or contains other files.
    """
    if (folder / PLAN_FILE).is_file():
        _check_same_plan(folder, plan)
    elif holds_files(folder):
        raise UserError(f"output folder {folder} contains other files: give another name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / PLAN_FILE, json.dumps(plan, indent=2).encode() + b"\n")


def _check_same_plan(folder: Path, plan: dict[str, Any]) -> None:
    earlier = json.loads((folder / PLAN_FILE).read_text())
    if earlier["autoencoder"]["identity"] == plan["autoencoder"]["identity"]:
        earlier["autoencoder"] = plan["autoencoder"]  # the same weights under another name
    if earlier["data"]["fingerprint"] == plan["data"]["fingerprint"]:
        earlier["data"] = plan["data"]
    if different := [key for key in plan if earlier.get(key) != plan[key]]:
        raise UserError(
            f"latents {folder} were started with other settings ({', '.join(different)} differ): "
            "use the same settings, or give another name"
        )


def write_latent_shard(path: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    """Write the moments of n images, (1 or 2, n, 2C, h, w), and their labels, int64 (n,)."""
    content = io.BytesIO()
    np.save(content, moments)
    data = content.getbuffer()
    metadata = {"labels": labels.tolist(), "sha256": hashlib.sha256(data).hexdigest()}
    # The metadata is written first, so a complete shard always has metadata.
    write_file(_metadata_path(path), json.dumps(metadata).encode())
    write_file(path, data)


def _metadata_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def write_index(folder: Path, plan: dict[str, Any], names: Iterable[str]) -> int:
    """Write the index of the shards with these file names, and return the number of images."""
    shards, labels = [], []
    for name in names:
        metadata = json.loads(_metadata_path(folder / name).read_text())
        if count := len(metadata["labels"]):  # 0 if no image of the shard was readable
            shards.append({"file": name, "num_images": count, "sha256": metadata["sha256"]})
            labels += metadata["labels"]
    all_labels, content = np.array(labels, np.int64), io.BytesIO()
    np.save(content, all_labels)
    write_file(folder / LABELS_FILE, content.getbuffer())
    index = {**plan, "num_images": len(labels), "shards": shards}
    index["content_hash"] = content_hash(index, all_labels)
    write_file(folder / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")
    _remove_temporary_files(folder)
    return len(labels)


def content_hash(index: dict[str, Any], labels: np.ndarray) -> str:
    """Return a SHA-256 over the shards' hashes, the labels, the classes and the autoencoder."""
    digest = hashlib.sha256()
    shards = [shard["sha256"] for shard in index["shards"]]
    facts = [shards, index["class_names"], index["flipped"], index["autoencoder"]["identity"]]
    digest.update(json.dumps(facts).encode())
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()


def _remove_temporary_files(folder: Path) -> None:
    """Remove the files that only an unfinished encoding needs; the index must exist."""
    index = json.loads((folder / INDEX_FILE).read_text())
    kept = {shard["file"] for shard in index["shards"]}
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
