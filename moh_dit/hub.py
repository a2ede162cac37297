"""Hub ids where a path is expected: a repository's files become a local folder, or one of them."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import UserError
from .weights import PICKLES

# Nothing else of a repository is wanted: not its code, nor weights for other frameworks.
SAFE = ["*.json", "*.safetensors", "README.md"]
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
    if match is None or name.startswith(".") or (file and not is_weight_file(file)):
        raise UserError(f"{name} does not exist")
    if file:
        folder = _snapshot(name, match[1], [file], local_files_only)
        if not (folder / file).is_file():
            raise UserError(f"{name}: {match[1]} has no file {file}")
        return folder / file
    folder = _snapshot(name, match[1], SAFE, local_files_only)
    model = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not list(model.glob("*.safetensors")):
        folder = _snapshot(name, match[1], SAFE + PICKLED, local_files_only)
    return folder


def is_weight_file(name: str) -> bool:
    """Whether a file is called like one with weights."""
    return name.endswith((".safetensors", *PICKLES))


def _snapshot(name: str, repository: str, patterns: list[str], local_files_only: bool) -> Path:
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=patterns, local_files_only=local_files_only
            )
        )
    except Exception as error:  # no network, no such repository, or a private one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: there is no such path, and as a hub id it is neither in the local cache nor "
            f"to be had ({reason[:160]}); give a local path, or go online once"
        ) from None
