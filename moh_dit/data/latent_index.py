"""Read the index of latents. Format 1 is converted to the structure of format 2 (docs/data.md)."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError

INDEX_FILE = "index.json"
PLAN_FILE = "encoding.json"
LABELS_FILE = "labels.npy"
MOMENTS = "moments"  # the array that every set of latents has


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``index.json`` and check that all files are present.

    Raises:
        UserError: the folder is missing, contains no latents, or is unfinished or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"latents folder {folder} does not exist")
    if not (folder / INDEX_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise UserError(
                f"latents {folder} are unfinished: run the same moh-dit encode command again with "
                "--resume"
            )
        raise UserError(f"folder {folder} contains no latents: it has no {INDEX_FILE}")
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        if index["format"] not in (1, 2):
            raise UserError(
                f"latents {folder} have format {index['format']}; this version reads 1 and 2"
            )
        index = to_format_2(index)
        files = [entry["file"] for shard in index["shards"] for entry in shard["arrays"].values()]
        files += [array["crc32"]["file"] for array in index["arrays"].values() if "crc32" in array]
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX_FILE} is not an index of latents") from None
    present = set(os.listdir(folder))
    for name in (LABELS_FILE, *files):
        if name not in present:
            raise UserError(f"latents {folder} are damaged: {name} is missing")
    return index


def to_format_2(index: dict[str, Any]) -> dict[str, Any]:
    """Return an index of format 1 in the structure of format 2, without checksums of records."""
    if index["format"] == 2:
        return index
    array = {"dtype": index["dtype"], "shape": index["moments_shape"]}
    shards = [
        {
            "num_images": shard["num_images"],
            "arrays": {MOMENTS: {"file": shard["file"], "sha256": shard["sha256"]}},
        }
        for shard in index["shards"]
    ]
    return {**index, "arrays": {MOMENTS: array}, "shards": shards}


def content_hash(index: dict[str, Any], labels: np.ndarray) -> str:
    """Return a SHA-256 over the moments' hashes, the labels, the classes and the autoencoder.

    Args:
        index: index in the structure of format 2.
        labels: int64 (N,).
    """
    digest = hashlib.sha256()
    shards = [shard["arrays"][MOMENTS]["sha256"] for shard in index["shards"]]
    facts = [shards, index["class_names"], index["flipped"], index["autoencoder"]["identity"]]
    digest.update(json.dumps(facts).encode())
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()
