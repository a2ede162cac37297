"""The files of a set of latents while it is being made: written aside, renamed when whole.

    encoding.json                 the plan: what the latents depend on
    moments-….npy                 moments of consecutive images, (1 or 2, n, 2C, h, w)
    moments-….npy.json            their labels and SHA-256; there before the shard is
    index.json, labels.npy        written last, from all of these; the plan and the facts then go

Whatever has its name is whole, so a kill costs the shards that were being made and nothing else.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.atomic_write import PARTIAL_SUFFIX, atomic_write
from ..common.errors import UserError
from .latents import INDEX_FILE, LABELS_FILE, PLAN_FILE, content_hash

SHARD_PREFIX = "moments-"
FACTS_SUFFIX = ".json"


def refuse_existing(folder: Path, resume: bool) -> None:
    """Raise ``UserError`` for a folder that is complete, or that is there and not resumed."""
    if (folder / INDEX_FILE).exists():
        _clear_unfinished(folder)
        raise UserError(f"latents {folder} are already complete: give a new name")
    if folder.exists() and not resume:
        raise UserError(f"output folder {folder} exists: give a new name, or --resume")


def open_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder of new latents, or go on in one that was begun with the same plan.

    Raises:
        UserError: the folder was begun with another plan, or holds something else.
    """
    if (folder / PLAN_FILE).is_file():
        _check_same_plan(folder, plan)
    elif folder.exists() and any(not p.name.endswith(PARTIAL_SUFFIX) for p in folder.iterdir()):
        raise UserError(f"output folder {folder} holds other things: give a new name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / PLAN_FILE, json.dumps(plan, indent=2).encode() + b"\n")
    for leftover in folder.glob(f".*{PARTIAL_SUFFIX}"):  # of a process that was killed
        leftover.unlink()


def _check_same_plan(folder: Path, plan: dict[str, Any]) -> None:
    earlier = json.loads((folder / PLAN_FILE).read_text())
    if earlier["autoencoder"]["identity"] == plan["autoencoder"]["identity"]:
        earlier["autoencoder"] = plan["autoencoder"]  # the same weights from wherever
    if earlier["data"]["fingerprint"] == plan["data"]["fingerprint"]:
        earlier["data"] = plan["data"]
    if different := [key for key in plan if earlier.get(key) != plan[key]]:
        raise UserError(
            f"latents {folder} were begun with other settings ({', '.join(different)} differ): "
            "give the same ones, or a new name"
        )


def write_shard(path: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    """Write moments (1 or 2, n, 2C, h, w) and what the index will say of them."""
    content = io.BytesIO()
    np.save(content, moments)
    data = content.getbuffer()
    facts = {"labels": labels.tolist(), "sha256": hashlib.sha256(data).hexdigest()}
    # The facts first: once the shard has its name, they are there too.
    write_file(facts_of(path), json.dumps(facts).encode())
    write_file(path, data)


def facts_of(path: Path) -> Path:
    """Where labels and hash of a shard are until the index has them."""
    return path.with_name(path.name + FACTS_SUFFIX)


def write_index(folder: Path, plan: dict[str, Any], names: Iterable[str]) -> int:
    """Complete a set of latents whose shards are all there; returns the number of images."""
    shards, labels = [], []
    for name in names:
        facts = json.loads(facts_of(folder / name).read_text())
        if facts["labels"]:  # else none of its images could be read
            count = len(facts["labels"])
            shards.append({"file": name, "num_images": count, "sha256": facts["sha256"]})
            labels += facts["labels"]
    all_labels, content = np.array(labels, np.int64), io.BytesIO()
    np.save(content, all_labels)
    write_file(folder / LABELS_FILE, content.getbuffer())
    index = {**plan, "num_images": len(labels), "shards": shards}
    index["content_hash"] = content_hash(index, all_labels)
    write_file(folder / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")
    _clear_unfinished(folder)
    return len(labels)


def _clear_unfinished(folder: Path) -> None:
    """Remove what only an unfinished set needs, now that the index has it all."""
    index = json.loads((folder / INDEX_FILE).read_text())
    kept = {shard["file"] for shard in index["shards"]}
    unfinished = [folder / PLAN_FILE, *folder.glob(f"{SHARD_PREFIX}*"), *folder.glob("*.done")]
    for path in unfinished:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """As :func:`moh_dit.common.atomic_write.atomic_write`.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what is finished stays: mend that and "
            "give the command again with --resume"
        ) from None
