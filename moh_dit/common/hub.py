"""Hub ids where a path is expected: a repository's files become a local folder, or one of them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Nothing else of a repository is wanted: not its code, nor weights for other frameworks.
SAFE = ["*.json", "*.safetensors", "README.md", "*.png"]
PICKLED = [f"*{suffix}" for suffix in PICKLES]


def local_path(source: str | Path, local_files_only: bool = False) -> Path:
    """Where a local path or a hub id is on this machine; downloads what the cache lacks.

    Args:
        source: a path; ``owner/name``; or ``owner/name/path/to/file`` for one weight file of a
            repository that has several.
        local_files_only: never ask the hub; also with ``HF_HUB_OFFLINE=1`` in the environment.

    Raises:
        UserError: when there is neither such a path nor, in the cache or on the hub, such an id.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)", name)
    file = match[2].removeprefix("/") if match else ""
    if match is None or name.startswith(".") or is_weight_file(file or name) != bool(file):
        raise UserError(f"checkpoint {name} does not exist; give a path, or a hub id (owner/name)")
    if file:
        folder = snapshot(match[1], [file], local_files_only=local_files_only)
        if not (folder / file).is_file():
            raise UserError(f"{name}: {match[1]} has no file {file}")
        return folder / file
    folder = snapshot(match[1], local_files_only=local_files_only)
    model = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not list(model.glob("*.safetensors")):
        folder = snapshot(match[1], SAFE + PICKLED, local_files_only=local_files_only)
    return folder


def is_weight_file(name: str) -> bool:
    """Whether a file is called like one with weights."""
    return name.endswith((".safetensors", *PICKLES))


def snapshot(repository: str, patterns: Sequence[str] = SAFE, **options: Any) -> Path:
    """The local folder of a hub repository with the files that match ``patterns``.

    Args:
        repository: ``owner/name``.
        patterns: which files are wanted.
        options: of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: when it is neither in the cache nor to be had from the hub.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # no network, no such repository, or a private one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{repository}: there is no such path, and as a hub id it is neither in the local "
            f"cache nor to be had ({reason[:160]}); give a local path, or go online once"
        ) from None
