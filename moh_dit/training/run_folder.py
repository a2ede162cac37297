"""Create the folder of a run, or check that its run can be resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..autoencoder import autoencoder_identity, load_autoencoder
from ..checkpoints.runs import DATA_FILE
from ..common.atomic_write import atomic_write, remove
from ..common.cli import load_config, save_config
from ..common.errors import UserError
from ..common.manifest import MANIFEST, find_damage
from ..common.paths import choose_autoencoder
from ..data.latents import open_latents
from .checkpoint_checks import move_aside
from .config import TrainConfig, flatten
from .run_log import environment
from .training_data import CLASS_FILE, TrainingData
from .training_state import remove_unfinished, write_in_run

# Settings that may change when a run is resumed. All others define what the run computes.
CHANGEABLE_ON_RESUME = (
    "run_dir", "resume", "no_verify", "num_steps", "log_every", "checkpoint_every",
    "keep_checkpoints", "trackers", "compile", "gradient_checkpointing",
    "gradient_accumulation_steps", "evaluation", "on_nonfinite", "deterministic", "allow_tf32",
    "peak_tflops", "ema_snapshot_every", "data.num_workers",
)  # fmt: skip
# data.json identifies the data by content, so these paths may change.
DATA_PATHS = ("data.source", "data.latents", "data.autoencoder")
CONFIG_FILE = "config.yaml"


def resolve_autoencoder(config: TrainConfig) -> TrainConfig:
    """Return the settings with the name of the autoencoder filled in.

    A resumed run keeps its autoencoder. Latents name the autoencoder that encoded them.

    Raises:
        UserError: no autoencoder is given for images other than the digits.
    """
    data, saved = config.data, Path(config.run_dir) / CONFIG_FILE
    name = data.autoencoder
    if name is None and saved.is_file():
        name = load_config(TrainConfig, saved).data.autoencoder
    if name is None and data.latents is not None:
        name = open_latents(data.latents).index["autoencoder"]["name"]
    name = choose_autoencoder(name, data.source, "--data.autoencoder")
    return replace(config, data=replace(data, autoencoder=name))


def check_resumable(config: TrainConfig, run: Path) -> None:
    """Raise ``UserError`` if ``config`` differs from the settings with which the run started."""
    path = run / CONFIG_FILE
    before, now = flatten(load_config(TrainConfig, path)), flatten(config)
    free = CHANGEABLE_ON_RESUME + (DATA_PATHS if (run / DATA_FILE).is_file() else ())
    changed = [
        f"{key} is {now[key]}, was {before[key]}"
        for key in now
        if now[key] != before[key] and key not in free and key.split(".")[0] not in free
    ]
    if changed:
        raise UserError(
            f"run {run} cannot be resumed with other settings: {'; '.join(changed)}. Give "
            f"--config {path}, or choose a new --run_dir"
        )


def check_same_data(run: Path, identity: dict[str, Any]) -> None:
    """Raise ``UserError`` if a run to be resumed started with other data or autoencoder.

    Args:
        run: the run folder; nothing is checked if it has no ``data.json``.
        identity: ``TrainingData.identity`` of the present data.
    """
    if not (run / DATA_FILE).is_file():
        return
    try:
        before = json.loads((run / DATA_FILE).read_text())
        # Runs of version 0.1.0 store neither classes nor the decoding policy.
        stored = identity.keys() - ({"classes", "decoding"} - before.keys()) - {"held_out"}
        known = {name: before[name] for name in stored}
        policy = known.pop("decoding", identity["decoding"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{run / DATA_FILE} is damaged ({error}); remove it to resume with the present data "
            "and autoencoder"
        ) from None
    if known["autoencoder"] != identity["autoencoder"]:
        raise UserError(
            f"run {run} started with another autoencoder; give that one, or choose a new --run_dir"
        )
    _check_same_split(run, before.get("held_out"), identity.get("held_out"))
    if any(known[name] != identity[name] for name in known):
        then, now = (f"{each['images']} {each['kind']}" for each in (known, identity))
        difference = f"{then} then, {now} now" if then != now else f"{now}, but other content"
        raise UserError(
            f"run {run} started with other data: {difference}; give the original data, or choose a "
            "new --run_dir"
        )
    if policy != identity["decoding"]:
        print(
            f"{run} started with version {policy} of the decoding policy; images are now decoded "
            f"by version {identity['decoding']}"
        )


def _check_same_split(run: Path, before: dict | None, now: dict | None) -> None:
    if before == now:
        return
    then, present = (f"{each['images']} held-out images" if each else "no held-out images"
                     for each in (before, now))  # fmt: skip
    difference = f"{then}, {present} now" if then != present else f"{then}, but others than now"
    raise UserError(
        f"run {run} started with {difference}, so it would train on held-out images or measure "
        "trained ones; give the original evaluation.held_out, or choose a new --run_dir"
    )


def prepare_run_folder(
    config: TrainConfig, start_step: int, data: TrainingData, scheduler: SchedulerMixin
) -> None:
    """Create the run folder or continue in it; every file is written atomically."""
    run = Path(config.run_dir)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {run} cannot be created: {error}") from None
    for folder in ("checkpoints", "snapshots"):
        remove_unfinished(run / folder)
    for leftover in run.glob(".writing-*"):  # of version 0.1.0
        remove(leftover)
    if (run / CONFIG_FILE).is_file():
        before = load_config(TrainConfig, run / CONFIG_FILE).trackers
        if dropped := [name for name in before if name not in config.trackers]:
            print(f"no longer logging to {', '.join(dropped)}; to continue that, resume with "
                  f"--trackers '[{', '.join(before)}]'")  # fmt: skip
    save_config(config, run / CONFIG_FILE)
    atomic_write(run / DATA_FILE, json.dumps(data.identity, indent=1).encode())
    atomic_write(run / CLASS_FILE, json.dumps(data.class_names, indent=1).encode())
    with (run / "environment.jsonl").open("a") as file:  # one line per start
        file.write(json.dumps({"start_step": start_step, **environment()}) + "\n")
    for name, part in (("vae", data.vae), ("scheduler", scheduler)):
        if (run / name).exists() and not config.no_verify:
            move_aside_if_damaged(run / name, data.identity["autoencoder"])
        if not (run / name).exists():
            with write_in_run(run / name, run) as partial:
                part.save_pretrained(partial)


def move_aside_if_damaged(folder: Path, autoencoder: str) -> None:
    """Rename the folder ``vae`` or ``scheduler`` of a run if it is damaged.

    Args:
        folder: the folder to check.
        autoencoder: the hash of the run's autoencoder, see ``autoencoder_identity``.
    """
    damage = find_damage(folder) if (folder / MANIFEST).is_file() else None
    if damage is None and folder.name == "vae":
        try:
            identity = autoencoder_identity(load_autoencoder(folder))
        except UserError as error:
            damage = str(error)
        else:
            if identity != autoencoder:
                damage = f"the weights in {folder} do not have the hash in {DATA_FILE}"
    if damage is not None:
        print(f"{damage}; moved it to {move_aside(folder).name}, writing it again")


def init_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers and log the settings of the run to them."""
    if config.trackers:
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flatten(config).items()
        }
        accelerator.init_trackers("moh-dit", settings)
