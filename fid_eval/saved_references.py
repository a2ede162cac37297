"""Find saved references by name. Imports no torch, so that mistakes are reported quickly."""

import os
from pathlib import Path

from .errors import EvaluationError, nearest_name

REFERENCE_SUFFIX = ".npz"


def home() -> Path:
    """Return the folder of saved references and listings: $FID_EVAL_HOME or ~/.cache/fid_eval."""
    return Path(os.environ.get("FID_EVAL_HOME", "~/.cache/fid_eval")).expanduser()


def reference_folder() -> Path:
    """Return the folder of saved references."""
    return home() / "references"


def saved_references() -> dict[str, Path]:
    """Return the paths of saved references by name."""
    return {path.stem: path for path in sorted(reference_folder().glob("*" + REFERENCE_SUFFIX))}


def is_local_path(source: str) -> bool:
    """Return whether ``source`` is a path, not a URL, a pattern or a folder within an archive."""
    if source.startswith(("hf:", "hf-stream:")) or any(c in source for c in "*{"):
        return False
    return not any(parent.is_file() for parent in Path(source).expanduser().parents)


def check_reference_exists(source: str) -> None:
    """Raise unless ``source`` exists, is the name of a saved reference, or is not a local path."""
    if os.path.exists(Path(source).expanduser()) or not is_local_path(source):
        return
    saved = saved_references()
    if source not in saved:
        hint = nearest_name(source, saved) if saved else "none is saved yet"
        raise EvaluationError(
            f"{source}: no such file or folder, and no saved reference of that name ({hint})"
        )


def check_samples_exist(sources: list[str]) -> None:
    """Raise if all of ``sources`` are local paths that do not exist.

    If only some of them are missing, the others are evaluated and the missing ones are reported.
    """
    if sources and all(
        is_local_path(path) and not os.path.exists(Path(path).expanduser()) for path in sources
    ):
        raise EvaluationError(f"{sources[0]}: no such file or folder")
