"""The model card of a folder: what it is, how it was trained, what was measured, what it draws.

``README.md`` with the YAML front matter that the hub reads, and the sample grid beside it.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..model.architecture import describe, preset_of

CARD, GRID = "README.md", "samples.png"
AUTOMATIC = "automatically generated"  # what diffusers says in a card that it made up
TAGS = ["diffusers", "class-conditional", "diffusion-transformer", "dit"]
TASK = "unconditional-image-generation"  # the nearest that the hub knows

USE = """## Use

With moh-dit installed, FOLDER being this folder or its hub id:

```python
from moh_dit import load_pipeline

pipeline = load_pipeline("FOLDER")
pipeline([0, 1, 2], guidance_scale=4.0).images
```

Where its code lies beside the weights (`pipeline.py`), diffusers alone opens it too:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
```
"""


@dataclass
class Facts:
    """What is known of a model beside its weights.

    Attributes:
        license: of the weights, as the hub spells it; "unknown" where nobody said.
        recipe: the resolved configuration of the run, as YAML.
        metrics: name and value, as far as measured.
        conditions: what the metrics depend on, in words.
        grid: a picture of samples.
        base_model: where the weights came from, for the hub.
    """

    license: str = "unknown"
    recipe: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    conditions: str = ""
    grid: Path | None = None
    base_model: str | None = None


def run_facts(run: Path) -> Facts:
    """What a run folder says of its model: configuration, newest evaluation, newest grid."""
    facts = Facts()
    if (run / "config.yaml").is_file():
        facts.recipe = (run / "config.yaml").read_text()
    if evaluations := sorted((run / "evaluations").glob("step-*.json")):
        result = json.loads(evaluations[-1].read_text())
        facts.metrics = result["metrics"]
        samples, extractors = result.get("samples", {}), result.get("extractors", {})
        facts.conditions = f"After {result['step']:,} steps"
        if count := samples.get("count"):
            facts.conditions += f", on {count:,} samples"
        if extractors:
            facts.conditions += f", features of {', '.join(extractors)}"
        facts.conditions += "; guidance and sampling steps under `evaluation` in the recipe."
    if grids := sorted((run / "samples").glob("step-*.png")):
        facts.grid = grids[-1]
    return facts


def write_card(folder: Path, config: dict[str, Any], facts: Facts) -> None:
    """Write ``README.md``, and the grid if there is one, into a pipeline folder."""
    description = describe(config)
    moh = "MoH" in description
    name = preset_of(config) or ("MoH-DiT" if moh else "DiT")
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="training-data",
            dataset_name="the run's reference",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in facts.metrics.items()
    ]
    front = ModelCardData(
        license=facts.license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS + ["mixture-of-head-attention"] * moh,
        base_model=facts.base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{front.to_yaml()}\n---", f"# {name}", _introduction(description, moh)]
    if facts.grid is not None:
        shutil.copyfile(facts.grid, folder / GRID)
        parts.append(f"![Samples, a row a class]({GRID})")
    parts.append(USE.strip())
    if facts.metrics:
        rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in facts.metrics.items())
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n\n{facts.conditions}")
    if facts.recipe is not None:
        parts.append(f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```")
    unknown = "Nobody stated the licence of these weights; ask whoever trained them."
    stated = f"The weights: {facts.license}." if facts.license != "unknown" else unknown
    parts.append(f"## Licence\n\n{stated} The code of moh-dit: apache-2.0.")
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _introduction(description: str, moh: bool) -> str:
    text = (
        f"{description[0].upper()}{description[1:]}: a class-conditional latent Diffusion "
        "Transformer ([DiT](https://arxiv.org/abs/2212.09748))"
    )
    if moh:
        text += (
            " whose tokens choose their attention heads "
            "([Mixture-of-Head attention](https://arxiv.org/abs/2410.11842))"
        )
    return text + "."


def keep_card(folder: Path, loaded_from: str | None, config: dict[str, Any]) -> None:
    """Give a saved folder the card of the one it was loaded from, or a plain one.

    A card that somebody wrote is left alone; one that diffusers made up is replaced.
    """
    card = folder / CARD
    if card.is_file() and AUTOMATIC not in card.read_text(encoding="utf-8"):
        return None
    source = Path(loaded_from or "") / CARD
    if not loaded_from or not source.is_file():
        return write_card(folder, config, Facts())
    text = source.read_text(encoding="utf-8")
    for picture in re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text):
        if (source.parent / picture).is_file() and not (folder / picture).exists():
            shutil.copyfile(source.parent / picture, folder / picture)
    card.write_text(text, encoding="utf-8")
    return None


def describes(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a folder has a card written here, of just this model."""
    card = folder / CARD
    return card.is_file() and describe(config)[1:] in card.read_text(encoding="utf-8")


def stated_license(folder: Path) -> str | None:
    """The licence in the front matter of a folder's card."""
    card = folder / CARD
    if not card.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", match[1], re.MULTILINE) if match else None
    return line[1] if line else None
