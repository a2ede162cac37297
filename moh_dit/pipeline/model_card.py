"""Write the model card of a pipeline folder.

The card is ``README.md``: YAML front matter for the hub, the recipe and the metrics of the run, and
a grid of samples.
"""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model.architecture import describe_architecture, find_preset

CARD, GRID = "README.md", "samples.png"
AUTOMATIC = "automatically generated"  # appears in every card that diffusers generates
TAGS = ["diffusers", "class-conditional", "diffusion-transformer", "dit"]
TASK = "unconditional-image-generation"  # the hub has no task for class-conditional generation

USE = """## Use

With moh-dit installed; FOLDER is this folder or its hub id:

```python
from moh_dit import load_pipeline

pipeline = load_pipeline("FOLDER")
pipeline([0, 1, 2], guidance_scale=4.0).images
```

If the folder contains the code (`pipeline.py`), diffusers opens it without moh-dit:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
```
"""


@dataclass
class CardDetails:
    """Content of a model card besides the description of the model.

    Attributes:
        license: licence of the weights, as the hub spells it; ``"unknown"`` if it is not stated.
        recipe: the resolved configuration of the run, as YAML.
        metrics: measured values, by name.
        conditions: how the metrics were measured.
        grid: a picture of samples.
        base_model: hub id of the model that the weights come from.
    """

    license: str = "unknown"
    recipe: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    conditions: str = ""
    grid: Path | None = None
    base_model: str | None = None


def write_card(folder: Path, config: dict[str, Any], details: CardDetails) -> None:
    """Write ``README.md``, and the sample grid if there is one, into a pipeline folder."""
    description = describe_architecture(config)
    moh = "MoH" in description
    name = find_preset(config) or ("MoH-DiT" if moh else "DiT")
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="training-data",
            dataset_name="the run's reference",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in details.metrics.items()
    ]
    front = ModelCardData(
        license=details.license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS + ["mixture-of-head-attention"] * moh,
        base_model=details.base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{front.to_yaml()}\n---", f"# {name}", _introduction(description, moh)]
    if details.grid is not None:
        shutil.copyfile(details.grid, folder / GRID)
        parts.append(f"![Samples, one row per class]({GRID})")
    parts.append(USE.strip())
    if details.metrics:
        rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in details.metrics.items())
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n\n{details.conditions}")
    if details.recipe is not None:
        parts.append(f"## Recipe\n\n```yaml\n{details.recipe.strip()}\n```")
    unknown = "The licence of these weights was not stated when this folder was written."
    stated = f"The weights: {details.license}." if details.license != "unknown" else unknown
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


def copy_or_write_card(folder: Path, loaded_from: str | None, config: dict[str, Any]) -> None:
    """Copy the card of the folder that a pipeline was loaded from, or write a new one.

    A card in ``folder`` is kept, except one that diffusers generated.
    """
    card = folder / CARD
    if card.is_file() and AUTOMATIC not in card.read_text(encoding="utf-8"):
        return None
    source = Path(loaded_from or "") / CARD
    if not loaded_from or not source.is_file():
        return write_card(folder, config, CardDetails())
    text = source.read_text(encoding="utf-8")
    for picture in re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text):
        if (source.parent / picture).is_file() and not (folder / picture).exists():
            shutil.copyfile(source.parent / picture, folder / picture)
    card.write_text(text, encoding="utf-8")
    return None


def card_matches_model(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether a folder has a card that this package wrote for this model."""
    card = folder / CARD
    return card.is_file() and describe_architecture(config)[1:] in card.read_text(encoding="utf-8")


def card_license(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's card, or ``None``."""
    card = folder / CARD
    return (
        ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    )
