"""Read a jobs file: a YAML file with a reference, sample sets and options."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import EvaluationError, nearest_name, printable


@dataclass
class Job:
    """One sample set.

    Attributes:
        path: path or URL of the set.
        name: name in results.
        metrics: metrics for this set; None for those of the run.
        x: position on the plot.
    """

    path: str
    name: str
    metrics: list[str] | None = None
    x: float | None = None

    def __post_init__(self) -> None:
        self.name = printable(self.name)


SET_KEYS = [field.name for field in fields(Job)]


def read_jobs(path: Path, options: Iterable[str]) -> tuple[dict[str, Any], list[Job]]:
    """Read a jobs file.

    Args:
        path: a YAML file with ``reference``, ``sets`` and any option of the command line.
        options: names of the options.

    Returns:
        The settings by name, ``reference`` included, and the sample sets.

    Raises:
        EvaluationError: unreadable file, unknown or missing key.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise EvaluationError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise EvaluationError(f"{path}: a jobs file needs the keys reference and sets")
    document = {str(key).replace("-", "_"): value for key, value in document.items()}
    _check_keys(document, ("reference", "sets", *options), str(path))
    for key in ("reference", "sets"):
        if not document.get(key):
            raise EvaluationError(f"{path}: {key!r} is missing")
    sets = document.pop("sets")
    if isinstance(sets, dict):
        sets = [
            {"name": str(name), **(value if isinstance(value, dict) else {"path": value})}
            for name, value in sets.items()
        ]
    if not isinstance(sets, list):
        raise EvaluationError(f"{path}: 'sets' must be a list of paths, or names with paths")
    return document, [_job(item, path) for item in sets]


def _check_keys(keys: Iterable[Any], known: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise EvaluationError(f"{where}: unknown key {key!r}; {nearest_name(str(key), known)}")


def _job(item: Any, path: Path) -> Job:
    if isinstance(item, str):
        return Job(item, item)
    if not isinstance(item, dict):
        raise EvaluationError(f"{path}: a set must be a path or a mapping, not {item!r}")
    _check_keys(item, SET_KEYS, f"{path}: a set")
    if not isinstance(item.get("path"), str):
        raise EvaluationError(f"{path}: a set has no 'path': {item!r}")
    metrics = item.get("metrics")
    if isinstance(metrics, str):
        metrics = [name.strip() for name in metrics.split(",")]
    return Job(item["path"], str(item.get("name", item["path"])), metrics, item.get("x"))
