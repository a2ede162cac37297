"""Collect the recipe, metrics and samples of a run for its model card."""

import json
from pathlib import Path

from ..pipeline.model_card import CardDetails
from .outputs import Output, read_outputs
from .set_results import find_results

SHOWN = {"guidance_scale": "guidance {}", "num_inference_steps": "{} steps", "seed": "seed {}"}


def run_details(source: Path | None, license: str | None = None) -> CardDetails:
    """Return the details of a run.

    The metrics are those of ``fid-eval`` for the newest measured sample set of the run, or those of
    the newest evaluation during training. The picture is the newest grid made with
    ``sample_dit.py``, or the newest one of training.

    Args:
        source: a run folder; other folders, or none, have no details.
        license: licence of the weights, as the hub spells it.
    """
    details = CardDetails(license=license or CardDetails.license)
    if source is None or not (source / "config.yaml").is_file():
        return details
    details.recipe = (source / "config.yaml").read_text()
    outputs, _ = read_outputs(source)
    if not _add_set_metrics(details, source, outputs):
        _add_training_metrics(details, source)
    made = [output.path for output in outputs if output.kind == "grid"]
    grids = [path for path in made if path.suffix == ".png"]
    grids = grids or sorted((source / "samples").glob("step-*.png"))
    details.grid = grids[-1] if grids else None
    return details


def _add_set_metrics(details: CardDetails, run: Path, outputs: list[Output]) -> bool:
    sets = {output.path: output for output in outputs if output.kind == "set"}
    results = {result.path: result for result in find_results(run, list(sets))}
    measured = [path for path in sets if path in results]
    if not measured:
        return False
    output, result = sets[measured[-1]], results[measured[-1]]
    details.metrics = result.metrics
    settings = [text.format(output.settings.get(key)) for key, text in SHOWN.items()]
    details.conditions = (
        f"After {output.step:,} steps, on {result.samples.get('count', 0):,} samples "
        f"({', '.join(settings)}) against {result.reference.get('name', 'the reference')}; "
        f"features of {', '.join(result.extractors)}."
    )
    return True


def _add_training_metrics(details: CardDetails, run: Path) -> None:
    if not (evaluations := sorted((run / "evaluations").glob("step-*.json"))):
        return
    result = json.loads(evaluations[-1].read_text())
    details.metrics = result["metrics"]
    samples, extractors = result.get("samples", {}), result.get("extractors", {})
    details.conditions = f"After {result['step']:,} steps"
    if count := samples.get("count"):
        details.conditions += f", on {count:,} samples"
    if extractors:
        details.conditions += f", features of {', '.join(extractors)}"
    details.conditions += "; guidance and sampling steps under `evaluation` in the recipe."
