"""One HTML file about a run, or several side by side: opens anywhere, needs nothing else."""

import base64
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..common.errors import UserError
from ..common.version import __version__
from ..training.config import TrainConfig, flatten
from .charts import COLORS, Series, line_chart, load_chart
from .config import ReportConfig
from .read_runs import Run, read_runs

TEMPLATE = "report.html.jinja"
KEEP_BYTES = 150_000  # a larger picture is stored as WebP
WEBP_QUALITY = 85
# Logged quantities: title, key, logarithmic.
LEARNING = [
    ("Noise MSE", "mse", True),
    ("VLB of the variance, bits/dim", "vlb", True),
    ("Load balance, 1 at even routing", "balance", False),
    ("Gradient norm before clipping", "grad_norm", True),
    ("Learning rate", "learning_rate", False),
]
SPEED = [
    ("Images per second", "images_per_second", False),
    ("Model FLOP utilisation", "mfu", False),
    ("Share of time waiting for data", "data_wait", False),
]
LEAST_SPREAD = 0.05  # of head load around even routing, where colours end
IRRELEVANT = ("run_dir", "resume")


@dataclass
class Grid:
    """A picture of samples, as a data URI."""

    step: int
    uri: str
    width: int
    height: int


def write_report(config: ReportConfig) -> None:
    """Read the runs of ``config`` and write its report."""
    output = Path(config.output)
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"output {output}: a report is written as .html")
    if output.exists() and not config.replace:
        raise UserError(f"output {output} exists; give another name, or --replace")
    if config.max_grids < 1:
        raise UserError(f"max_grids is {config.max_grids}; it must be at least 1")
    if len(config.runs) > len(COLORS):
        raise UserError(f"{len(config.runs)} runs: side by side go at most {len(COLORS)}")
    page = render([*map(Path, config.runs)], config.max_grids)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {output} ({len(page.encode()) / 1e6:.1f} MB)")


def render(folders: list[Path], max_grids: int = 24) -> str:
    """The report of run folders as HTML.

    Args:
        folders: one or more run folders.
        max_grids: pictures of samples to embed of each run, evenly over its steps.
    """
    runs = read_runs(folders)
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
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        colors=COLORS,
        summary=summary(runs),
        differences=differences(runs),
        learning=logged_charts(runs, LEARNING),
        loads=loads,
        spread=spread,
        grids=grids,
        steps=sorted({grid.step for some in grids.values() for grid in some}),
        metric_charts=metric_charts(runs),
        metric_table=metric_table(runs),
        speed=logged_charts(runs, SPEED),
        environments=environments(runs),
    )


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """What a reader asks first: rows of a label and a value for each run."""
    rows: list[tuple[str, list[str]]] = [
        ("steps", [_progress(run) for run in runs]),
        ("whole checkpoints", [_number(len(run.checkpoints)) for run in runs]),
    ]
    for label, key in (("loss, last", "loss"), ("noise MSE, last", "mse"),
                       ("load balance, last", "balance")):  # fmt: skip
        rows.append((label, [_number(_last(run.series(key)[1])) for run in runs]))
    for key in metric_keys(runs):
        rows.append((f"{key}, last", [_number(_last(run.metrics(key)[1])) for run in runs]))
    rates = [run.series("images_per_second")[1] for run in runs]
    rows.append(("images per second, median", [_number(_median(rate)) for rate in rates]))
    shares = [("model FLOP utilisation, median", "mfu"), ("waiting for data, median", "data_wait")]
    for label, key in shares:
        found = [_median(run.series(key)[1]) for run in runs]
        rows.append((label, ["–" if v is None else f"{100 * v:.1f} %" for v in found]))
    rows.append(("heads that no token chose, last", [_dead_heads(run) for run in runs]))
    return [(label, values) for label, values in rows if set(values) != {"–"}]


def _progress(run: Run) -> str:
    planned = run.config.get("num_steps")
    return f"{run.step:,} of {planned:,}" if isinstance(planned, int) else f"{run.step:,}"


def _dead_heads(run: Run) -> str:
    loads = [entry["head_load"] for entry in run.log if "head_load" in entry]
    if not loads:
        return "–"
    return str(sum(share == 0 for layer in loads[-1].values() for share in layer))


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ; for a single run, in which it differs from the defaults.

    Rows of a dotted key and a value for each run; beside a single run stands the default.
    """
    configs = [run.config for run in runs]
    if len(runs) == 1:
        configs = [*configs, flatten(TrainConfig())]
    keys = [key for key in dict.fromkeys(k for c in configs for k in c) if key not in IRRELEVANT]
    rows = [(key, [_setting(config, key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and any(configs[0])]


def _setting(config: dict[str, Any], key: str) -> str:
    value = config.get(key, "–")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "empty"
    return "none" if value is None else str(value)


def logged_charts(runs: list[Run], what: list[tuple[str, str, bool]]) -> list[tuple[str, str]]:
    """``(title, SVG)`` of logged quantities, those of which nothing was logged left out."""
    charts = []
    for title, key, log in what:
        pairs = zip(COLORS, runs, strict=False)
        series = [Series(run.name, color, *run.series(key)) for color, run in pairs]
        if any(value for line in series for value in line.values):
            charts.append((title, line_chart(title, series, log=log)))
    return [(title, chart) for title, chart in charts if chart]


def head_load_charts(runs: list[Run]) -> tuple[dict[str, list[tuple[str, str]]], float]:
    """For each run ``(layer, SVG)`` of its head load over training; and where the colours end."""
    loads = {run.name: relative_load(run) for run in runs}
    everything = [load.ravel() for layers in loads.values() for load in layers.values()]
    spread = LEAST_SPREAD
    if everything:  # a few extreme entries, at the start of most runs, shall not wash out the rest
        found = float(np.quantile(abs(np.concatenate(everything) - 1), 0.98))
        spread = min(1.0, max(LEAST_SPREAD, round(found, 2)))
    charts: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        steps = [entry["step"] for entry in run.log if entry.get("head_load")]
        charts[run.name] = [
            (f"layer {layer}", load_chart(f"{run.name}, layer {layer}", steps, load, spread))
            for layer, load in loads[run.name].items()
        ]
    return charts, spread


def relative_load(run: Run) -> dict[str, np.ndarray]:
    """For each routed layer float (entries, E): logged load over that of even routing."""
    entries = [entry["head_load"] for entry in run.log if entry.get("head_load")]
    loads = {layer: np.array([entry[layer] for entry in entries]) for layer in dict(*entries[:1])}
    return {layer: load / load.mean(1, keepdims=True) for layer, load in loads.items()}


def metric_keys(runs: Iterable[Run]) -> list[str]:
    """Names of all metrics that some run was evaluated by."""
    return list(dict.fromkeys(k for run in runs for e in run.evaluations for k in e["metrics"]))


def metric_charts(runs: list[Run]) -> list[tuple[str, str]]:
    """``(title, SVG)`` of every metric over the steps."""
    charts = []
    for key in metric_keys(runs):
        better = [e.get("higher_is_better", {}).get(key) for r in runs for e in r.evaluations]
        known = next((value for value in better if value is not None), None)
        hint = {True: ", higher is better", False: ", lower is better", None: ""}[known]
        pairs = zip(COLORS, runs, strict=False)
        series = [Series(run.name, color, *run.metrics(key)) for color, run in pairs]
        if chart := line_chart(key, series):
            charts.append((key + hint, chart))
    return charts


def metric_table(runs: list[Run]) -> list[dict[str, Any]]:
    """Every evaluation with its conditions: run, step, samples, reference, metrics, warnings."""
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
    """For each start of each run its environment, flat and in words."""
    starts = []
    for run in runs:
        for start in run.starts:
            packages = start.get("packages") or {}
            shown = {
                "time": start.get("time"),
                "device": start.get("device"),
                "host": start.get("host"),
                "command": start.get("command"),
                "commit": start.get("git_commit"),
                "python": start.get("python"),
                "packages": ", ".join(f"{name} {v}" for name, v in packages.items() if v),
            }
            title = f"{run.name}, from step {start.get('start_step', 0):,}"
            starts.append((title, {key: str(value) for key, value in shown.items() if value}))
    return starts


def embed_grids(run: Run, most: int) -> list[Grid]:
    """Pictures of samples as data URIs, at most so many, evenly over the steps, with the last."""
    steps = list(run.grids)
    if len(steps) > most:
        kept = np.linspace(len(steps) - 1, 0, most).round().astype(int)[::-1]
        run.missing.append(f"{len(steps) - most} of {len(steps)} sample grids are not shown")
        steps = [steps[index] for index in kept]
    return [_embedded(step, run.grids[step]) for step in steps]


def _embedded(step: int, path: Path) -> Grid:
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if len(content) > KEEP_BYTES:
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, format="WEBP", quality=WEBP_QUALITY)
            if len(smaller.getvalue()) < len(content):
                content, kind = smaller.getvalue(), "webp"
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Grid(step, uri, width, height)


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
