"""What a run folder holds, read with forgiveness: a run may be torn, or still going on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..checkpoints.opening import checkpoint_step, list_checkpoints
from ..common.cli import load_config
from ..common.errors import UserError
from ..sampling.sample_set import flattened
from ..training.config import TrainConfig, flatten
from ..training.run_log import read_log

KNOWN = ("config.yaml", "log.jsonl", "environment.jsonl", "samples", "evaluations", "checkpoints")


@dataclass
class Run:
    """One run as far as it can be read.

    Attributes:
        name: how the report calls it.
        folder: where it is.
        config: settings by dotted key.
        starts: the environment of every start.
        log: entries of averaged training values, by step.
        evaluations: metrics and their conditions, by step.
        grids: pictures of samples by step.
        checkpoints: steps of whole checkpoints.
        missing: what is not there or could not be read, in words.
    """

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[int, Path] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        ends = [entry["step"] for entry in self.log[-1:] + self.evaluations[-1:]]
        return max([*ends, *self.grids, *self.checkpoints], default=0)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged quantity."""
        found = [(e["step"], e[key]) for e in self.log if isinstance(e.get(key), (int, float))]
        return [step for step, _ in found], [value for _, value in found]

    def metrics(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of an evaluated metric."""
        found = [(e["step"], e["metrics"][key]) for e in self.evaluations if key in e["metrics"]]
        return [step for step, _ in found], [value for _, value in found]


def read_runs(folders: list[Path]) -> list[Run]:
    """Read run folders, each under the shortest name that tells it from the others.

    Raises:
        UserError: a folder is missing, given twice, or holds nothing of a run.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if not path.is_dir():
            raise UserError(f"run {folder} does not exist, or is no folder")
        if resolved.count(path) > 1:
            raise UserError(f"run {folder} is given twice")
        if not any((path / name).exists() for name in KNOWN):
            raise UserError(f"{folder} holds nothing of a run (no {', '.join(KNOWN)})")
    return [read_run(path, name) for path, name in zip(resolved, _names(resolved), strict=True)]


def _names(paths: list[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder; whatever is missing or torn is left out and named."""
    run = Run(name, folder)
    run.config = _read_config(run)
    run.log = [e for e in _read_entries(run, "log.jsonl") if "loss" in e and "step" in e]
    run.starts = _read_entries(run, "environment.jsonl")
    run.evaluations = _read_evaluations(run)
    run.grids = _read_grids(run)
    run.checkpoints = [checkpoint_step(path) for path in list_checkpoints(folder)]
    if not run.checkpoints:
        run.missing.append("no whole checkpoint")
    planned = run.config.get("num_steps")
    if planned and run.step < planned:
        run.missing.append(f"not finished: step {run.step:,} of {planned:,}")
    return run


def _read_config(run: Run) -> dict[str, Any]:
    path = run.folder / "config.yaml"
    if not path.is_file():
        run.missing.append("config.yaml")
        return {}
    try:
        return flatten(load_config(TrainConfig, path))
    except UserError as error:
        run.missing.append(f"settings as this version knows them ({error})")
    try:  # of another version, perhaps
        return flattened(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        return {}


def _read_entries(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(name)
        return []
    try:
        entries = read_log(path)
        lines = len(path.read_text().splitlines())
    except UnicodeDecodeError:
        run.missing.append(f"{name} (no text)")
        return []
    if len(entries) < lines:
        rest = "it is" if len(entries) == lines - 1 else "it and what follows are"
        run.missing.append(f"{name}: line {len(entries) + 1} is torn; {rest} left out")
    return [entry for entry in entries if isinstance(entry, dict)]


def _read_evaluations(run: Run) -> list[dict[str, Any]]:
    found = []
    for path in sorted((run.folder / "evaluations").glob("step-*.json")):
        try:
            entry = json.loads(path.read_text())
            found.append({"step": int(entry["step"]), **entry, "metrics": dict(entry["metrics"])})
        except (ValueError, KeyError, TypeError):
            run.missing.append(f"evaluations/{path.name} (cannot be read)")
    if not found:
        run.missing.append("no evaluation")
    return found


def _read_grids(run: Run) -> dict[int, Path]:
    grids = {}
    for path in sorted((run.folder / "samples").glob("step-*.png")):
        try:
            with Image.open(path) as image:
                image.load()
            grids[int(path.stem.removeprefix("step-"))] = path
        except (OSError, ValueError, SyntaxError):
            run.missing.append(f"samples/{path.name} (cannot be read)")
    if not grids:
        run.missing.append("no samples")
    return grids
