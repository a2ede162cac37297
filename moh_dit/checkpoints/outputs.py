"""Record in a run folder what was made from the run: ``outputs.jsonl``, one line per output.

    {"time": "…", "kind": "grid", "path": "grid.png", "step": 2000, "settings": {"seed": 0, …}}

``path`` is relative for outputs inside the run folder, and absolute for others.
"""

import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..common.errors import UserError
from .runs import checkpoint_step, resolve_checkpoint

OUTPUTS_FILE = "outputs.jsonl"
Kind = Literal["grid", "strip", "sweep", "animation", "set", "head load"]


@dataclass
class Output:
    """A file or folder that was made from a run.

    Attributes:
        time: time of writing, ISO 8601 in UTC.
        kind: what the output shows.
        path: absolute path.
        step: number of training steps of the checkpoint.
        settings: resolved settings of the program.
    """

    time: str
    kind: Kind
    path: Path
    step: int
    settings: dict[str, Any]


def record_output(checkpoint: str, kind: Kind, path: Path, settings: Any) -> None:
    """Record an output in the run folder of its checkpoint; do nothing for other checkpoints.

    A run folder that cannot be written, such as that of a colleague, is named on stderr.

    Args:
        checkpoint: path or Hub id that was sampled from.
        kind: what the output shows.
        path: the output.
        settings: dataclass with the resolved settings.
    """
    try:
        run, folder = resolve_checkpoint(Path(checkpoint))
    except UserError:  # a pipeline, a file or a Hub id
        return
    path = path.resolve()
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "path": str(path.relative_to(run) if path.is_relative_to(run) else path),
        "step": checkpoint_step(folder),
        "settings": asdict(settings),
    }
    try:
        with (run / OUTPUTS_FILE).open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
    except OSError as error:
        print(f"{path} is not recorded in {run / OUTPUTS_FILE}: {error.strerror}", file=sys.stderr)


def read_outputs(run: Path) -> tuple[list[Output], list[str]]:
    """Read the outputs of a run that still exist; the newest record of a path counts.

    Returns:
        ``(outputs, problems)``: outputs in order of time, and a text for each unreadable line.
    """
    file, problems = run / OUTPUTS_FILE, []
    found: dict[Path, Output] = {}
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            path = run / entry["path"]
            output = Output(
                str(entry["time"]), entry["kind"], path, int(entry["step"]), dict(entry["settings"])
            )
        except (ValueError, TypeError, KeyError):
            problems.append(f"{OUTPUTS_FILE}: line {number} cannot be read")
            continue
        found.pop(path, None)
        if path.exists():
            found[path] = output
    return list(found.values()), problems
