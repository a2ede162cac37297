"""Write one self-contained HTML file about a run, or about several runs side by side."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ..common.atomic_write import atomic_write
from ..common.errors import UserError
from ..common.version import __version__
from ..sampling.output_formats import encode_image
from ..training.config import TrainConfig, flatten
from .config import ReportConfig
from .report_charts import COLORS, colored_series, head_load_chart, line_chart
from .run_reader import Run, read_run_folders

TEMPLATE = "report.html.jinja"
MAX_PNG_BYTES = 150_000  # larger pictures are stored as WebP
WEBP_QUALITY = 85
# Logged quantities: title, key, whether the axis is logarithmic.
LEARNING = [
    ("Noise MSE", "mse", True),
    ("VLB of the variance, bits/dim", "vlb", True),
    ("Load balance (1 is balanced)", "balance", False),
    ("Gradient norm before clipping", "grad_norm", True),
    ("Learning rate", "learning_rate", False),
]
SPEED = [
    ("Images per second", "images_per_second", False),
    ("Model FLOP utilisation", "mfu", False),
    ("Fraction of time spent waiting for data", "data_wait", False),
]
MIN_SPREAD = 0.05  # the colours of relative head load cover at least 1 ± MIN_SPREAD
NOT_COMPARED = ("run_dir", "resume")


@dataclass
class Grid:
    """A sample grid as a data URI, with its size in pixels."""

    step: int
    uri: str
    width: int
    height: int


def write_report(config: ReportConfig) -> None:
    """Write the report of ``config.runs`` to ``config.output``."""
    config.check_paths()
    output = Path(config.output)
    if len(config.runs) > len(COLORS):
        raise UserError(f"{len(config.runs)} runs are given; a report shows at most {len(COLORS)}")
    page = render_report([*map(Path, config.runs)], config.max_grids).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, page)
    print(f"wrote {output} ({len(page) / 1e6:.1f} MB)")


def render_report(folders: list[Path], max_grids: int = 24) -> str:
    """Return the report of run folders as HTML.

    Args:
        folders: one or more run folders.
        max_grids: maximum number of sample grids per run, evenly spaced over its steps.

    Raises:
        UserError: a folder is not a run folder, or Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("a report needs Jinja2: pip install 'moh-dit[report]'") from None
    runs = read_run_folders(folders)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    loads, spread = head_load_charts(runs)
    grids = {run.name: embed_grids(run, max_grids) for run in runs}
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        colors=COLORS,
        summary=summary_rows(runs),
        differences=setting_differences(runs),
        learning=logged_charts(runs, LEARNING),
        loads=loads,
        spread=spread,
        grids=grids,
        steps=sorted({grid.step for some in grids.values() for grid in some}),
        metric_charts=metric_charts(runs),
        metric_table=metric_rows(runs),
        speed=logged_charts(runs, SPEED),
        environments=environments(runs),
    )


def summary_rows(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the summary: a label and one value per run."""
    rows: list[tuple[str, list[str]]] = [
        ("steps", [_progress(run) for run in runs]),
        ("complete checkpoints", [_number(len(run.checkpoints)) for run in runs]),
    ]
    for label, key in (("last loss", "loss"), ("last noise MSE", "mse"),
                       ("last load balance", "balance")):  # fmt: skip
        rows.append((label, [_number(next(reversed(run.series(key)[1]), None)) for run in runs]))
    for key in metric_keys(runs):
        last = [next(reversed(run.metrics(key)[1]), None) for run in runs]
        rows.append((f"last {key}", [_number(value) for value in last]))
    rates = [run.series("images_per_second")[1] for run in runs]
    rows.append(("median images per second", [_number(_median(rate)) for rate in rates]))
    shares = [("median model FLOP utilisation", "mfu"), ("median wait for data", "data_wait")]
    for label, key in shares:
        found = [_median(run.series(key)[1]) for run in runs]
        rows.append((label, ["–" if v is None else f"{100 * v:.1f} %" for v in found]))
    rows.append(("heads without tokens at the last step", [_dead_heads(run) for run in runs]))
    return [(label, values) for label, values in rows if set(values) != {"–"}]


def _progress(run: Run) -> str:
    planned = run.config.get("num_steps")
    return f"{run.step:,} of {planned:,}" if isinstance(planned, int) else f"{run.step:,}"


def _dead_heads(run: Run) -> str:
    loads = [entry["head_load"] for entry in run.log if "head_load" in entry]
    if not loads:
        return "–"
    return str(sum(share == 0 for layer in loads[-1].values() for share in layer))


def setting_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between the runs, or from the defaults for a single run.

    Each row has a dotted key and one value per run. For a single run, the default follows.
    """
    configs = [run.config for run in runs]
    if len(runs) == 1:
        configs = [*configs, flatten(TrainConfig())]
    keys = [key for key in dict.fromkeys(k for c in configs for k in c) if key not in NOT_COMPARED]
    rows = [(key, [_setting(config, key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and any(configs[0])]


def _setting(config: dict[str, Any], key: str) -> str:
    value = config.get(key, "–")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "empty"
    return "none" if value is None else str(value)


def logged_charts(
    runs: list[Run], quantities: list[tuple[str, str, bool]]
) -> list[tuple[str, str]]:
    """Return ``(title, SVG)`` of each quantity that was logged."""
    charts = []
    for title, key, log in quantities:
        series = colored_series(run.series(key) for run in runs)
        not_zero = any(value for line in series for value in line.values)
        if not_zero and (chart := line_chart(title, series, log=log)):
            charts.append((title, chart))
    return charts


def head_load_charts(runs: list[Run]) -> tuple[dict[str, list[tuple[str, str]]], float]:
    """Return ``(layer, SVG)`` of the head load over training for each run, and the colour spread.

    The colours run from ``1 - spread`` to ``1 + spread``.
    """
    loads = {run.name: relative_load(run) for run in runs}
    all_loads = [load.ravel() for layers in loads.values() for load in layers.values()]
    spread = MIN_SPREAD
    if all_loads:
        # A quantile, because the first steps of most runs have a few extreme values.
        quantile = float(np.quantile(abs(np.concatenate(all_loads) - 1), 0.98))
        spread = min(1.0, max(MIN_SPREAD, round(quantile, 2)))
    charts: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        steps = [entry["step"] for entry in run.log if entry.get("head_load")]
        charts[run.name] = [
            (f"layer {layer}", head_load_chart(f"{run.name}, layer {layer}", steps, load, spread))
            for layer, load in loads[run.name].items()
        ]
    return charts, spread


def relative_load(run: Run) -> dict[str, np.ndarray]:
    """Return for each routed layer float (entries, E): load divided by balanced load."""
    entries = [entry["head_load"] for entry in run.log if entry.get("head_load")]
    loads = {layer: np.array([entry[layer] for entry in entries]) for layer in dict(*entries[:1])}
    return {layer: load / load.mean(1, keepdims=True) for layer, load in loads.items()}


def metric_keys(runs: Iterable[Run]) -> list[str]:
    """Return the names of all metrics in the evaluations of the runs."""
    return list(dict.fromkeys(k for run in runs for e in run.evaluations for k in e["metrics"]))


def metric_charts(runs: list[Run]) -> list[tuple[str, str]]:
    """Return ``(title, SVG)`` of each metric over the steps."""
    charts = []
    for key in metric_keys(runs):
        better = [e.get("higher_is_better", {}).get(key) for r in runs for e in r.evaluations]
        known = next((value for value in better if value is not None), None)
        hint = {True: ", higher is better", False: ", lower is better", None: ""}[known]
        series = colored_series(run.metrics(key) for run in runs)
        if chart := line_chart(key, series):
            charts.append((key + hint, chart))
    return charts


def metric_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Return the metrics and conditions of each evaluation, formatted as text."""
    keys = metric_keys(runs)
    rows = []
    for run in runs:
        for entry in run.evaluations:
            samples, reference = entry.get("samples") or {}, entry.get("reference") or {}
            images = reference.get("statistics_count") or reference.get("image_count")
            rows.append(
                {
                    "run": run.name,
                    "step": f"{entry['step']:,}",
                    "samples": _number(samples.get("count")),
                    "reference": f"{reference.get('name', '–')} ({_number(images)})",
                    "values": {key: _number(entry["metrics"].get(key)) for key in keys},
                    "warnings": entry.get("warnings") or [],
                }
            )
    return rows


def environments(runs: list[Run]) -> list[tuple[str, dict[str, str]]]:
    """Return a title and the environment, as text, for each start of each run."""
    starts = []
    for run in runs:
        for start in run.starts:
            packages = start.get("packages") or {}
            named = ("time", "device", "host", "command", "git_commit", "python")
            facts = {key.removeprefix("git_"): start.get(key) for key in named}
            facts["packages"] = ", ".join(f"{name} {v}" for name, v in packages.items() if v)
            title = f"{run.name}, from step {start.get('start_step', 0):,}"
            starts.append((title, {key: str(value) for key, value in facts.items() if value}))
    return starts


def embed_grids(run: Run, max_grids: int) -> list[Grid]:
    """Return at most ``max_grids`` sample grids, evenly spaced and including the last one."""
    steps = list(run.grids)
    if len(steps) > max_grids:
        kept = np.linspace(len(steps) - 1, 0, max_grids).round().astype(int)[::-1]
        run.missing.append(f"{len(steps) - max_grids} of {len(steps)} sample grids are left out")
        steps = [steps[index] for index in kept]
    return [_embedded(step, run.grids[step]) for step in steps]


def _embedded(step: int, path: Path) -> Grid:
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if len(content) > MAX_PNG_BYTES:
            smaller = encode_image(image.convert("RGB"), "WEBP", quality=WEBP_QUALITY)
            if len(smaller) < len(content):
                content, kind = smaller, "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Grid(step, uri, width, height)


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
