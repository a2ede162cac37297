"""The folder of a run when it starts: refused, compared with what it began with, or made."""

import json
import os
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from diffusers import AutoencoderKL, SchedulerMixin

from ..autoencoder import autoencoder_identity
from ..common.atomic_write import atomic_write
from ..common.cli import load_config, save_config
from ..common.errors import UserError
from ..data.images import ImageSet
from ..data.latents import LatentSet, LatentStore
from .config import TrainConfig, flatten
from .run_log import environment
from .training_state import clear_leftovers, written_for_run

# What may change when a run is resumed; everything else defines what is being computed.
FREE_ON_RESUME = (
    "run_dir", "resume", "num_steps", "log_every", "checkpoint_every", "keep_checkpoints",
    "trackers", "compile", "gradient_checkpointing", "gradient_accumulation_steps", "evaluation",
    "on_nonfinite", "deterministic", "allow_tf32", "peak_tflops", "ema_snapshot_every",
    "data.num_workers",
)  # fmt: skip
# Where data and autoencoder lie, too: whether they are the same is known without.
PLACES = ("data.source", "data.latents", "data.autoencoder")
DATA_FILE = "data.json"


def check_resumable(config: TrainConfig, run: Path) -> None:
    """Raise ``UserError`` naming the keys in which ``config`` differs from the run's own."""
    path = run / "config.yaml"
    before, now = flatten(load_config(TrainConfig, path)), flatten(config)
    free = FREE_ON_RESUME + (PLACES if (run / DATA_FILE).is_file() else ())
    changed = [
        f"{key} is {now[key]}, was {before[key]}"
        for key in now
        if now[key] != before[key] and key not in free and key.split(".")[0] not in free
    ]
    if changed:
        raise UserError(
            f"cannot resume {run} with another configuration: {'; '.join(changed)}. "
            f"Use --config {path}, or a new run_dir"
        )


def data_identity(data: ImageSet | LatentSet, vae: AutoencoderKL) -> dict[str, Any]:
    """What tells the data and the autoencoder of a run from others, wherever they lie."""
    if isinstance(data, LatentStore):
        kind, content = "latents", data.index["content_hash"]
    else:
        kind, content = "images", cast(ImageSet, data).fingerprint()
    autoencoder = autoencoder_identity(vae)
    return {"kind": kind, "images": len(data), "content": content, "autoencoder": autoencoder}


def check_same_data(run: Path, identity: dict[str, Any]) -> None:
    """Raise ``UserError`` where a run to be resumed began with other data."""
    if not (run / DATA_FILE).is_file():
        return
    try:
        before = json.loads((run / DATA_FILE).read_text())
        known = {name: before[name] for name in identity}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{run / DATA_FILE} is damaged ({error}); remove it to go on with data and autoencoder "
            "as they are"
        ) from None
    if known["autoencoder"] != identity["autoencoder"]:
        raise UserError(f"{run} began with another autoencoder; give that one, or a new run_dir")
    if known != identity:
        then, now = (f"{each['images']} {each['kind']}" for each in (known, identity))
        difference = f"{then} then, {now} now" if then != now else f"{now}, but not the same"
        raise UserError(
            f"{run} began with other data: {difference}; give the data it began with, or a new "
            "run_dir"
        )


def refuse_existing(run_dir: Path, resume: bool) -> None:
    """Raise ``UserError`` rather than write into a run folder that holds something."""
    if run_dir.is_file():
        raise UserError(f"run folder {run_dir} is a file")
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        raise UserError(
            f"run folder {run_dir} exists; add --resume to continue it, or choose another --run_dir"
        )
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"run folder {run_dir}: {nearest} is no folder that can be written to")


def open_run_folder(
    config: TrainConfig,
    start_step: int,
    class_names: list[str],
    identity: dict[str, Any],
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
) -> None:
    """Make the folder, or go on in it; whatever is written is whole or not there."""
    run = Path(config.run_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be made: {error}") from None
    for folder in ("checkpoints", "snapshots"):
        clear_leftovers(run / folder)
    save_config(config, run / "config.yaml")
    atomic_write(run / DATA_FILE, json.dumps(identity, indent=1).encode())
    atomic_write(run / "classes.json", json.dumps(class_names, indent=1).encode())
    with (run / "environment.jsonl").open("a") as file:  # one line for each start
        file.write(json.dumps({"start_step": start_step, **environment()}) + "\n")
    for name, part in (("vae", vae), ("scheduler", scheduler)):
        if not (run / name).exists():
            with written_for_run(run / name, run) as aside:
                part.save_pretrained(aside)


def init_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers with the settings of the run."""
    plain = (bool, int, float, str)
    if config.trackers:
        settings = {
            key: value if isinstance(value, plain) else str(value)
            for key, value in flatten(config).items()
        }
        accelerator.init_trackers("moh-dit", settings)
