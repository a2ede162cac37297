"""The sampling program: a configuration in, a grid or a set and its settings out."""

import json
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..checkpoints import load_pipeline, resolve_checkpoint
from ..errors import UserError
from ..pipeline import MoHDiTPipeline
from .config import SampleConfig
from .exact import sample_set, set_labels, weights_digest
from .grids import sample_grid


def sample(config: SampleConfig) -> None:
    """Make what ``config`` asks for; called by every process of a launch."""
    config.check()
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    if config.num_samples is None and output.suffix != ".png":
        raise UserError(f"output {output}: a grid is a .png; for a set give num_samples")
    config = replace(config, checkpoint=str(resolved(Path(config.checkpoint))))
    pipeline = load_pipeline(config.checkpoint, config.weights)
    labels = parse_labels(pipeline, config.class_labels)
    # One process may wait long for another's last batch.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()
    state = PartialState(cpu=config.device == "cpu", **waiting)
    if config.dtype != "float32":
        torch.nn.Module.to(pipeline.transformer, getattr(torch, config.dtype))
    pipeline.to(state.device)

    output.parent.mkdir(parents=True, exist_ok=True)
    settings = record(config, pipeline)
    if config.num_samples is not None:
        sample_set(
            pipeline,
            config,
            output,
            set_labels(config.num_samples, labels, config.labels, config.seed),
            batch_size=config.batch_size,
            decode_batch_size=config.decode_batch_size,
            record=settings,
            state=state,
        )
    elif state.is_main_process:
        sheet = sample_grid(
            pipeline,
            config,
            labels,
            config.images_per_class,
            batch_size=config.batch_size,
            decode_batch_size=config.decode_batch_size,
        )
        text = PngInfo()
        text.add_itxt("settings", settings)
        output.with_name(output.name + ".yaml").write_text(settings)
        sheet.save(output, pnginfo=text)
    if state.is_main_process:
        print(f"wrote {output} and {output.name}.yaml")


def resolved(path: Path) -> Path:
    """The very checkpoint that a run folder stands for now."""
    if (path / "model_index.json").is_file():
        return path
    return resolve_checkpoint(path)[1]


def parse_labels(pipeline: MoHDiTPipeline, text: str | None) -> list[int]:
    """Class ids of ``"golden retriever,88"``; all classes for ``None``.

    Names may have commas of their own: the longest name that fits is taken.
    """
    if text is None:
        return list(range(pipeline.transformer.config.num_classes))
    names = set(pipeline.config.class_names or [])
    parts = text.split(",")
    labels = []
    while parts:
        for length in range(len(parts), 0, -1):
            if (name := ",".join(parts[:length]).strip()) in names or length == 1:
                labels.append(name)
                parts = parts[length:]
                break
    return pipeline.label_ids(labels)


def record(config: SampleConfig, pipeline: MoHDiTPipeline) -> str:
    """The resolved configuration as YAML, which ``--config`` reads, under what else was used."""
    channels = pipeline.transformer.config.in_channels
    guided = config.guidance_channels or channels
    facts = [
        f"moh-dit {__version__}, torch {torch.__version__}, {pipeline.device.type}",
        f"transformer sha256 {weights_digest(pipeline.transformer)}",
        f"autoencoder sha256 {weights_digest(pipeline.vae)}",
        f"guidance on {'all' if guided == channels else f'the first {guided} of'} {channels} "
        "latent channels",
    ]
    settings = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
    return "".join(f"# {fact}\n" for fact in facts) + settings
