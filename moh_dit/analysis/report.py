"""Write one self-contained HTML file about a run, or about several runs side by side."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..common.atomic_write import atomic_write
from ..common.errors import UserError
from ..common.version import __version__
from ..training.config import TrainConfig, flatten
from .config import ReportConfig
from .report_charts import COLORS, Marks, colored_series, head_load_chart, line_chart
from .report_outputs import embed_grids, embed_outputs, format_number, set_rows, sweep_charts
from .run_reader import Run, read_run_folders

TEMPLATE = "report.html.jinja"
# Logged quantities: title, key, whether the axis is logarithmic.
LEARNING = [
    ("VLB of the variance, bits/dim", "vlb", True),
    ("Load balance (1 is balanced)", "balance", False),
    ("Gradient norm before clipping", "grad_norm", True),
    ("Learning rate", "learning_rate", False),
]
LOSSES = (("mse", "-"), ("held_out_loss", "--"), ("train_sample_loss", ":"))
MIN_PAUSE = 1.0  # seconds; shorter pauses are not marked
SPEED = [
    ("Model FLOP utilisation", "mfu", False),
    ("Fraction of time spent waiting for data", "data_wait", False),
]
MIN_SPREAD = 0.05  # the colours of relative head load cover at least 1 ± MIN_SPREAD
NOT_COMPARED = ("run_dir", "resume")


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
    pictures = embed_outputs(runs, max_grids)
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        colors=COLORS,
        summary=summary_rows(runs),
        differences=setting_differences(runs),
        learning=[*loss_chart(runs), *logged_charts(runs, LEARNING)],
        held_out=any(run.series("held_out_loss")[0] for run in runs),
        loads=loads,
        spread=spread,
        grids=grids,
        steps=sorted({grid.step for some in grids.values() for grid in some}),
        metric_charts=metric_charts(runs),
        metric_table=metric_rows(runs),
        pictures=pictures,
        sets=set_rows(runs),
        set_metrics=list(dict.fromkeys(k for run in runs for r in run.results for k in r.metrics)),
        sweeps=sweep_charts(runs),
        speed=[*speed_chart(runs), *logged_charts(runs, SPEED)],
        pauses=pause_texts(runs),
        environments=environments(runs),
    )


def summary_rows(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the summary: a label and one value per run."""
    rows: list[tuple[str, list[str]]] = [
        ("steps", [_progress(run) for run in runs]),
        ("complete checkpoints", [format_number(len(run.checkpoints)) for run in runs]),
    ]
    for label, key in (("last loss", "loss"), ("last noise MSE", "mse"),
                       ("last load balance", "balance")):  # fmt: skip
        rows.append(
            (label, [format_number(next(reversed(run.series(key)[1]), None)) for run in runs])
        )
    for key in metric_keys(runs):
        last = [next(reversed(run.metrics(key)[1]), None) for run in runs]
        rows.append((f"last {key}", [format_number(value) for value in last]))
    rates = [run.series("images_per_second")[1] for run in runs]
    rows.append(("median images per second", [format_number(_median(rate)) for rate in rates]))
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


def loss_chart(runs: list[Run]) -> list[tuple[str, str]]:
    """Return title and chart of the noise MSE in training and on held-out images."""
    series = [
        line
        for key, dashes in LOSSES
        for line in colored_series((r.series(key) for r in runs), dashes)
    ]
    chart = line_chart("Noise MSE", series, log=True)
    return [("Noise MSE", chart)] if chart else []


def speed_chart(runs: list[Run]) -> list[tuple[str, str]]:
    """Return title and chart of the throughput, with the pauses and restarts of each run."""
    marks = [
        Marks(color, [step for step, _ in pauses(run)], restarts(run))
        for color, run in zip(COLORS, runs, strict=False)
    ]
    series = colored_series(run.series("images_per_second") for run in runs)
    chart = line_chart("Images per second", series, marks=marks)
    return [("Images per second", chart)] if chart else []


def pauses(run: Run) -> list[tuple[int, float]]:
    """Return the step and the seconds of each pause for saving, sampling or measuring."""
    steps, seconds = run.series("paused_seconds")
    return [pair for pair in zip(steps, seconds, strict=True) if pair[1] >= MIN_PAUSE]


def restarts(run: Run) -> list[int]:
    """Return the steps from which training was resumed."""
    return [start["start_step"] for start in run.starts if start.get("start_step")]


def pause_texts(runs: list[Run]) -> list[str]:
    """Return for each run how long it paused and how often it was resumed."""
    texts = []
    for run in runs:
        found, resumed = pauses(run), len(restarts(run))
        total = sum(seconds for _, seconds in found)
        parts = (
            [f"{len(found)} {'pause' if len(found) == 1 else 'pauses'}, {total:,.0f} s"]
            if found
            else []
        )
        parts += [f"resumed {resumed} {'time' if resumed == 1 else 'times'}"] if resumed else []
        if parts:
            texts.append(f"{run.name}: {', '.join(parts)}")
    return texts


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
        first = run.first_heads
        charts[run.name] = [
            (
                f"layer {layer}",
                head_load_chart(
                    f"{run.name}, layer {layer}", steps, load, spread, first.get(layer, 0)
                ),
            )
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
                    "samples": format_number(samples.get("count")),
                    "reference": f"{reference.get('name', '–')} ({format_number(images)})",
                    "values": {key: format_number(entry["metrics"].get(key)) for key in keys},
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


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
