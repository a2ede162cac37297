"""Write results as a table, JSON, CSV and a plot."""

import csv
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .atomic_write import atomic_path
from .csv_cells import plain_cell
from .errors import EvaluationError
from .result import Result
from .version import __version__

Document = dict[str, Any]  # keys: versions, settings, reference, extractors, sets


def versions() -> dict[str, str]:
    """Return versions of the software, and the hardware, that a result depends on."""
    found = {
        "fid_eval": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_fidelity": version("torch-fidelity"),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def document_of(result: Result) -> Document:
    """Return the document of one result."""
    entry = result.to_dict()
    shared = {key: entry.pop(key) for key in ("reference", "extractors")}
    return {"versions": versions(), "settings": {}, **shared, "sets": [entry]}


def write_json(document: Document, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def metric_keys(document: Document) -> list[str]:
    """Return the keys of all computed metrics, in order and without duplicates."""
    return list(
        dict.fromkeys(key for entry in document["sets"] for key in entry.get("metrics", {}))
    )


def format_value(value: float | None, interval: list[float] | None = None) -> str:
    """Format a value with 4 digits, or 2 from 100, and half the width of its interval."""
    if value is None:
        return "–"
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:.2f}"
    if not float(text):
        text = text.removeprefix("-")  # A distance of zero may be rounded to −0.0000.
    if interval:
        text += f" ± {(interval[1] - interval[0]) / 2:.2g}"
    return text


def table(document: Document) -> str:
    """Format a table of sets and metrics, followed by the conditions of the measurement."""
    keys = metric_keys(document)
    rows = [["set", "images", *keys]]
    for entry in document["sets"]:
        if "error" in entry:
            rows.append([entry["name"], "failed", *["–"] * len(keys)])
            continue
        intervals = entry.get("intervals", {})
        values = [format_value(entry["metrics"].get(key), intervals.get(key)) for key in keys]
        count = entry["samples"]["count"]
        rows.append([entry["name"], "–" if count is None else f"{count:,}", *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines + _notes(document))


def _notes(document: Document) -> list[str]:
    reference, lines = document["reference"], [""]
    if reference:
        images = f", {reference['image_count']:,} images" if reference.get("image_count") else ""
        count = reference.get("statistics_count")
        of = f" of {count:,} images" if count else ""
        stored = reference["frechet_from"] == "statistics"
        source = f"stored statistics{of}" if stored else f"its {reference['frechet_from']}"
        lines.append(
            f"reference: {reference['name']} ({reference['kind']}{images}; "
            f"Fréchet distance from {source})"
        )
        if classes := reference.get("reading", {}).get("classes"):
            lines.append(f"classes: {classes}")
    for name, extractor in document["extractors"].items():
        digits = (extractor.get("sha256") or "unknown")[:12]
        lines.append(f"extractor: {name}, weights {digits}, {extractor['network_precision']}")
    described = {entry["samples"].get("labels") for entry in document["sets"] if "samples" in entry}
    if known := sorted(described - {None}):
        lines.append(f"labels of the samples: {', '.join(known)}")
    distances = {mode for entry in document["sets"] for mode in _distances(entry)}
    lines += [f"precision and recall: {mode} distances" for mode in sorted(distances)]
    found: dict[str, list[str]] = {}
    for entry in document["sets"]:
        for warning in entry.get("warnings", []):
            found.setdefault(warning, []).append(entry["name"])
    return lines + [f"note: {warning}" for warning in found]


def _distances(entry: dict[str, Any]) -> list[str]:
    """Return the distance modes of the metrics of one set."""
    details = entry.get("details", {}).values()
    return sorted({detail["distances"] for detail in details if "distances" in detail})


def write_csv(document: Document, path: Path) -> None:
    """Write one row per set: name, images, metrics, interval bounds, conditions and error."""
    keys = metric_keys(document)
    with_interval = [
        key for key in keys if any(key in e.get("intervals", {}) for e in document["sets"])
    ]
    reference, extractors = document["reference"], document["extractors"]
    precisions = sorted({extractor["network_precision"] for extractor in extractors.values()})
    rows = []
    for entry in document["sets"]:
        samples, metrics = entry.get("samples", {}), entry.get("metrics", {})
        row = {"name": entry["name"], "images": samples.get("count")}
        row["labels"] = samples.get("labels")
        row |= {key: metrics.get(key) for key in keys}
        for key in with_interval:
            bounds = entry.get("intervals", {}).get(key, (None, None))
            row[f"{key}_low"], row[f"{key}_high"] = bounds
        row |= {
            "distances": " ".join(_distances(entry)),
            "network_precision": " ".join(precisions),
            "extractor": " ".join(extractors),
            "extractor_sha256": " ".join(e.get("sha256") or "-" for e in extractors.values()),
            "reference": reference.get("name"),
            "reference_sha256": reference.get("sha256"),
            "frechet_from": reference.get("frechet_from"),
            "samples_sha256": samples.get("sha256"),
            "fid_eval": document["versions"]["fid_eval"],
            "torch": document["versions"]["torch"],
            "error": entry.get("error"),
        }
        rows.append({key: plain_cell(value) for key, value in row.items()})
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot_positions(document: Document) -> tuple[list[float], bool]:
    """Return the x position of each evaluated set, and whether positions are numbers.

    A position is the ``x`` of the set, or the last number in its name, or its index.
    """
    entries = [entry for entry in document["sets"] if "error" not in entry]
    given = [float(entry["x"]) for entry in entries if entry.get("x") is not None]
    if len(given) == len(entries):
        return given, True
    numbers = [re.findall(r"\d+(?:\.\d+)?", Path(entry["name"]).name) for entry in entries]
    last = [float(found[-1]) for found in numbers if found]
    if len(set(last)) == len(entries):
        return last, True
    return [float(index) for index in range(len(entries))], False


def write_plot(document: Document, path: Path, metrics: list[str] | None = None) -> None:
    """Plot metrics over the sets as PNG, for example over checkpoints or guidance scales."""
    from .fonts import plain_text

    names = [str(each.get("name", "")) for each in (*document["sets"], document["reference"])]
    with plain_text(names):
        _write_plot(document, path, metrics)


def _write_plot(document: Document, path: Path, metrics: list[str] | None) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    keys = metric_keys(document)
    wanted = metrics or keys
    unknown = [key for key in wanted if key not in keys]
    if unknown:
        raise EvaluationError(f"--plot_metrics: no {unknown[0]!r} in the results {', '.join(keys)}")
    entries = [entry for entry in document["sets"] if "error" not in entry]
    if not entries:
        raise EvaluationError("--plot: no set could be evaluated")
    x, numeric = plot_positions(document)
    order = sorted(range(len(x)), key=x.__getitem__)
    figure, axes = plt.subplots(
        len(wanted), 1, figsize=(7, 2.4 * len(wanted) + 0.6), squeeze=False, sharex=True
    )
    for axis, key in zip(axes[:, 0], wanted, strict=True):
        present = [i for i in order if key in entries[i]["metrics"]]
        values = [entries[i]["metrics"][key] for i in present]
        bounds = [entries[i].get("intervals", {}).get(key) for i in present]
        positions = [x[i] for i in present]
        if values and all(bounds):
            errors = [(high - low) / 2 for low, high in bounds]  # type: ignore[misc]
            axis.errorbar(positions, values, errors, marker="o", capsize=3)
        else:
            axis.plot(positions, values, marker="o")
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if not numeric:
        names = [Path(entry["name"]).name for entry in entries]
        axes[-1, 0].set_xticks(x, names, rotation=30, ha="right")
    axes[0, 0].set_title(f"against {document['reference'].get('name', '')}", fontsize=10)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
