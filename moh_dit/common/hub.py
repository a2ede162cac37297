"""Download repositories of the Hugging Face hub where a checkpoint's path is expected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .errors import UserError
from .paths import PICKLES, split_hub_id

# Files to download. Code and the weights of other frameworks are never needed.
SAFE = ["*.json", "*.safetensors", "README.md", "*.png"]
PICKLED = [f"*{suffix}" for suffix in PICKLES]


def local_path(source: str | Path, local_files_only: bool = False) -> Path:
    """Return the local path of a checkpoint; download a hub id that is not in the cache.

    Args:
        source: see :func:`split_hub_id`.
        local_files_only: download nothing; ``HF_HUB_OFFLINE=1`` in the environment does the same.

    Raises:
        UserError: there is no such path, and no such hub id in the cache or on the hub.
    """
    found = split_hub_id(source)
    if found is None:
        return Path(source)
    repository, file = found
    if file:
        folder = snapshot(repository, [file], local_files_only=local_files_only)
        if not (folder / file).is_file():
            raise UserError(f"{source}: the repository {repository} has no file {file}")
        return folder / file
    folder = snapshot(repository, local_files_only=local_files_only)
    model = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not list(model.glob("*.safetensors")):
        folder = snapshot(repository, SAFE + PICKLED, local_files_only=local_files_only)
    return folder


def snapshot(repository: str, patterns: Sequence[str] = SAFE, **options: Any) -> Path:
    """Return the local folder of a hub repository, with the files that match ``patterns``.

    Args:
        repository: ``owner/name``.
        patterns: names of the files to download.
        options: further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: the repository is not in the local cache, and it could not be downloaded.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # no network, no such repository, or a private one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{repository}: there is no such path; as a hub id, it is not in the local cache, and "
            f"it could not be downloaded ({reason[:160]}); give a local path, or go online once"
        ) from None
