"""Check the settings of a training run.

Paths are checked before torch is imported, so that a wrong path is reported at once.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.paths import (
    choose_autoencoder,
    holds_files,
    require_autoencoder,
    require_data,
    split_hub_id,
)

if TYPE_CHECKING:
    from .config import TrainConfig

SCHEDULES_WITHOUT_WARMUP = ("constant", "piecewise_constant")
# Lower bounds by dotted key. A setting that is None is not checked.
LOWER_BOUNDS = {
    "num_steps": 1, "log_every": 1, "checkpoint_every": 1, "gradient_accumulation_steps": 1,
    "keep_checkpoints": 0, "ema_snapshot_every": 0, "balance_loss_weight": 0,
    "model.depth": 1, "model.patch_size": 1, "model.hidden_size": 1, "model.num_classes": 1,
    "model.label_init_std": 0, "data.num_workers": 0, "optimizer.weight_decay": 0,
    "optimizer.lr_warmup_steps": 0, "evaluation.sample_every": 0, "evaluation.fid_every": 0,
    "evaluation.num_inference_steps": 1, "evaluation.held_out_every": 0,
    "evaluation.held_out_images": 1,
}  # fmt: skip
MAY_BE_INFINITE = ("peak_tflops", "objective.min_snr_gamma", "optimizer.max_grad_norm")
POSITIVE = ("model.mlp_ratio", "optimizer.learning_rate", *MAY_BE_INFINITE)
SET_SUFFIXES = (".npz", ".npy", ".zip", ".tar", ".safetensors")


def check_paths(config: "TrainConfig") -> None:
    """Raise ``UserError`` for local paths that do not exist, and for an existing run folder.

    Hub ids, ``hf://`` data and patterns of file names are checked later, when they are opened.
    """
    run_dir, data, evaluation = Path(config.run_dir), config.data, config.evaluation
    check_run_dir(run_dir, config.resume)
    # A resumed run takes its autoencoder from its own settings.
    started = (run_dir / "config.yaml").is_file()
    if data.latents is not None:
        _require("data.latents", data.latents, "give a folder written by moh-dit encode")
    else:
        require_data(data.source)
        if not started:
            choose_autoencoder(data.autoencoder, data.source, "--data.autoencoder")
    if data.autoencoder is not None:
        require_autoencoder(data.autoencoder)
    # A run with a checkpoint takes its weights from there.
    if config.init_from is not None and not any(run_dir.glob("checkpoints/step-*")):
        split_hub_id(config.init_from, "init_from")
    if isinstance(evaluation.held_out, str):
        try:
            require_data(evaluation.held_out)
        except UserError:
            raise UserError(
                f"evaluation.held_out {evaluation.held_out} does not exist; give a share such as "
                "0.05, a text file with one image per line, or images or latents of their own"
            ) from None
    if evaluation.fid_every:
        if evaluation.feature_extractor_weights is not None:
            _require(
                "evaluation.feature_extractor_weights",
                evaluation.feature_extractor_weights,
                "give a file, or leave it out to download the weights",
            )
        reference = evaluation.reference or ""
        # A word without "/" may be a saved name. "*" and "{" mark a pattern of file names.
        is_path = "/" in reference or reference.endswith(SET_SUFFIXES)
        if is_path and not reference.startswith("hf://") and not set("*{") & set(reference):
            _require("evaluation.reference", reference, "give a file or a saved name of fid-eval")


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raise ``UserError`` for a run folder that cannot be written to, or exists without resume.

    Every process may check: rank 0 creates the folder after all ranks have joined the process
    group.
    """
    if run_dir.is_file():
        raise UserError(f"run_dir {run_dir} is a file; choose another --run_dir")
    if holds_files(run_dir) and not resume:
        raise UserError(
            f"run_dir {run_dir} exists; add --resume to continue the run, or choose another "
            "--run_dir"
        )
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"run_dir {run_dir}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"run_dir {run_dir}: no permission to write to {nearest}")


def _require(setting: str, path: str, advice: str) -> None:
    if not Path(path).expanduser().exists():
        raise UserError(f"{setting} {path} does not exist; {advice}")


def check_values(config: "TrainConfig", settings: dict[str, Any], num_processes: int) -> None:
    """Raise ``UserError`` for values that are out of range or contradict each other.

    Args:
        config: the settings of the run.
        settings: the same settings by dotted key.
        num_processes: number of processes of the run.
    """
    from .ema import power_gamma, power_name

    given = {key: value for key, value in settings.items() if value is not None}
    for key, least in LOWER_BOUNDS.items():
        if not given.get(key, least) >= least:
            raise UserError(f"{key} is {given[key]}; it must be at least {least}")
    for key in POSITIVE:
        if not given.get(key, 1) > 0:
            raise UserError(f"{key} is {given[key]}; it must be greater than 0")
    for key, value in given.items():
        if value == math.inf and key not in MAY_BE_INFINITE:
            raise UserError(f"{key} is inf; it must be finite")
    optimizer, evaluation, decays = config.optimizer, config.evaluation, config.ema_decays
    micro_batches = num_processes * config.gradient_accumulation_steps
    for wrong, message in (
        (config.batch_size < 1 or config.batch_size % micro_batches,
         f"batch_size {config.batch_size} is not divisible by {num_processes} processes × "
         f"{config.gradient_accumulation_steps} gradient_accumulation_steps"),
        (not 0 <= config.seed < 2**64,
         f"seed is {config.seed}; it must be at least 0 and below 2**64"),
        (not 0 <= config.label_dropout < 1,
         f"label_dropout is {config.label_dropout}; it must lie in [0, 1)"),
        (not config.objective.logit_normal[1] > 0,
         f"objective.logit_normal is {config.objective.logit_normal}; its second value, the "
         "standard deviation, must be greater than 0"),
        (not all(0 <= beta < 1 for beta in optimizer.betas),
         f"optimizer.betas is {optimizer.betas}; both must lie in [0, 1)"),
        (optimizer.lr_warmup_steps and optimizer.lr_schedule in SCHEDULES_WITHOUT_WARMUP,
         f"optimizer.lr_schedule {optimizer.lr_schedule} has no warm-up; set it to "
         "constant_with_warmup, linear or cosine, or leave optimizer.lr_warmup_steps out"),
        (evaluation.fid_every and evaluation.num_samples < 4,
         f"evaluation.num_samples is {evaluation.num_samples}; use at least 4 for precision and "
         "recall, and several thousand for FID"),
        (evaluation.fid_every and not evaluation.metrics,
         "evaluation.metrics is empty; add one, or set evaluation.fid_every to 0"),
        (not isinstance(evaluation.held_out, str | None) and not 0 < evaluation.held_out < 1,
         f"evaluation.held_out is {evaluation.held_out}; a share must lie between 0 and 1"),
        (not decays or not all(0 <= decay < 1 for decay in decays),
         f"ema_decays is {decays}; give at least one value, all in [0, 1)"),
        (len(set(decays)) < len(decays), f"ema_decays {decays} contains a decay twice"),
        (len(set(map(power_name, config.ema_power_stds))) < len(config.ema_power_stds),
         f"ema_power_stds {config.ema_power_stds} contains a width twice"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)
    for std in config.ema_power_stds:
        power_gamma(std)
