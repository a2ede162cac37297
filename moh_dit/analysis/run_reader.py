"""Read run folders for a report. A run may be incomplete, damaged or still in progress."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.outputs import Output, read_outputs
from ..checkpoints.runs import checkpoint_name, checkpoint_step, list_checkpoints
from ..checkpoints.set_results import SetResult, find_results
from ..common.cli import load_config
from ..common.config_files import read_yaml
from ..common.errors import UserError
from ..sampling.set_shards import flatten_dict
from ..training.config import TrainConfig, flatten
from ..training.run_log import read_lines

RUN_CONTENTS = ("config.yaml", "log.jsonl", "environment.jsonl", "samples", "evaluations",
                "checkpoints")  # fmt: skip


@dataclass
class Run:
    """The readable contents of one run folder.

    Attributes:
        name: name of the run in the report.
        folder: path of the run.
        config: settings by dotted key.
        starts: environment of each start of training.
        log: averaged training values, in order of their steps.
        evaluations: metrics and their conditions, in order of their steps.
        grids: path of each sample grid, by step.
        checkpoints: steps of the complete checkpoints.
        outputs: files and folders that were made from the run.
        results: results of ``fid-eval`` for sample sets of the run.
        missing: descriptions of everything that is missing or could not be read.
        notes: facts about the report that are no fault of the run.
    """

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[int, Path] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    results: list[SetResult] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Return the last step of any log entry, evaluation, grid or checkpoint."""
        ends = [entry["step"] for entry in self.log[-1:] + self.evaluations[-1:]]
        return max([*ends, *self.grids, *self.checkpoints], default=0)

    @property
    def first_heads(self) -> dict[str, int]:
        """Return the number of the first routed head of each routed layer; 0 if it is unknown.

        Heads are numbered as in the layer: the shared heads come first.
        """
        for entry in reversed(self.log):
            if "shared_heads" in entry:
                return entry["shared_heads"]
        if not self.checkpoints:
            return {}
        folder = self.folder / "checkpoints" / checkpoint_name(self.checkpoints[-1])
        try:  # logs of 0.1.0 do not contain the numbers
            shared = json.loads((folder / "transformer" / "config.json").read_text())
            return {str(i): s or 0 for i, s in enumerate(shared["num_shared_heads"])}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a logged quantity."""
        found = [(e["step"], e[key]) for e in self.log if isinstance(e.get(key), (int, float))]
        return [step for step, _ in found], [value for _, value in found]

    def metrics(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of an evaluated metric."""
        found = [(e["step"], e["metrics"][key]) for e in self.evaluations if key in e["metrics"]]
        return [step for step, _ in found], [value for _, value in found]


def read_run_folders(folders: list[Path]) -> list[Run]:
    """Read run folders and give each the shortest name that is unique among them.

    Raises:
        UserError: a folder is given twice or is not a run folder.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise UserError(f"run {folder} is given twice")
        if not any((path / name).exists() for name in RUN_CONTENTS):
            raise UserError(f"{folder} is not a run folder: it has no {', '.join(RUN_CONTENTS)}")
    names = _shortest_unique_names(resolved)
    return [read_run_folder(path, name) for path, name in zip(resolved, names, strict=True)]


def _shortest_unique_names(paths: list[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run_folder(folder: Path, name: str) -> Run:
    """Read one run folder; list missing and damaged parts in ``Run.missing``."""
    run = Run(name, folder)
    run.config = _read_config(run)
    entries = _read_entries(run, "log.jsonl")
    run.log = [entry for entry in entries if isinstance(entry.get("step"), int)]
    run.starts = _read_entries(run, "environment.jsonl")
    run.evaluations = _read_evaluations(run)
    run.grids = _read_grids(run)
    run.checkpoints = [checkpoint_step(path) for path in list_checkpoints(folder)]
    run.outputs, problems = read_outputs(folder)
    run.missing += problems
    sets = [output.path for output in run.outputs if output.kind == "set"]
    run.results = find_results(folder, sets)
    if not run.checkpoints:
        run.notes.append("there is no complete checkpoint yet")
    planned = run.config.get("num_steps")
    if planned and run.step < planned:
        run.notes.append(f"the run has not finished: step {run.step:,} of {planned:,}")
    return run


def _read_config(run: Run) -> dict[str, Any]:
    path = run.folder / "config.yaml"
    if not path.is_file():
        run.missing.append("config.yaml")
        return {}
    try:
        return flatten(load_config(TrainConfig, path))
    except UserError as error:
        run.missing.append(f"config.yaml does not fit this version ({error})")
    try:  # show the settings all the same: another version may have written them
        return flatten_dict(read_yaml(path))
    except (UserError, AttributeError):
        return {}


def _read_entries(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(name)
        return []
    lines = read_lines(path)
    damaged = [str(number) for number, entry in enumerate(lines, 1) if entry is None]
    if damaged == [str(len(lines))]:
        run.missing.append(f"{name}: line {len(lines)} is incomplete; it is left out")
    elif damaged:
        run.missing.append(f"{name}: damaged lines are left out: {', '.join(damaged[:10])}")
    return [entry for entry in lines if entry is not None]


def _read_evaluations(run: Run) -> list[dict[str, Any]]:
    found = []
    for path in sorted((run.folder / "evaluations").glob("step-*.json")):
        try:
            entry = json.loads(path.read_bytes())
            numbers = {
                key: value
                for key, value in entry["metrics"].items()
                if value is None or isinstance(value, int | float)
            }
            found.append({**entry, "step": int(entry["step"]), "metrics": numbers})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            run.missing.append(f"evaluations/{path.name} (cannot be read)")
    return found


def _read_grids(run: Run) -> dict[int, Path]:
    names = ((path, re.fullmatch(r"step-(\d+)\.png", path.name))
             for path in (run.folder / "samples").glob("step-*.png"))  # fmt: skip
    return dict(sorted((int(name[1]), path) for path, name in names if name))
