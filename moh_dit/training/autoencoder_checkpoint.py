"""Save and restore an unfinished training of an autoencoder.

    OUTPUT.partial/
      step-00001000/
        training.yaml            settings
        state.json               number of processes, identity of the data
        model.safetensors        weights
        optimizer.safetensors    AdamW's state, as "INDEX.NAME" for each parameter

Random numbers follow from the seed and the step, so checkpoints contain no RNG state.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoints.runs import checkpoint_name, checkpoint_step
from ..common.atomic_write import atomic_output, remove
from ..common.cli import load_config, save_config
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..common.manifest import MANIFEST, find_damage
from ..data.images import ImageSet
from .autoencoder_config import AutoencoderTrainingConfig
from .config import flatten

# Settings that may change on resume. The identity of the data is compared instead of its path.
CHANGEABLE_ON_RESUME = (
    "output", "resume", "data", "num_workers", "cache_images_gib", "checkpoint_every", "compile",
    "allow_tf32", "perceptual_weights",
)  # fmt: skip


@dataclass
class AutoencoderCheckpoint:
    """The training state of an autoencoder, and its checkpoint on disk."""

    config: AutoencoderTrainingConfig
    accelerator: Accelerator
    images: ImageSet
    vae: AutoencoderKL
    optimizer: torch.optim.Optimizer
    perceptual_sha256: str | None = None

    def save(self, step: int) -> None:
        """Write the checkpoint after ``step`` steps atomically; then delete the previous one.

        Raises:
            UserError: a weight is not finite, or the disk is full; the previous checkpoint is kept.
        """
        run_on_main_process(self.accelerator, lambda: self._write(step))

    def _write(self, step: int) -> None:
        final = self.config.partial / checkpoint_name(step)
        if final.exists():
            return
        weights = {name: _on_cpu(value) for name, value in self.vae.state_dict().items()}
        if not all(value.isfinite().all() for value in weights.values()):
            raise UserError(
                f"a weight is not finite after step {step}: use a learning_rate below "
                f"{self.config.learning_rate}"
            )
        state = self.optimizer.state_dict()["state"]
        moments = {
            f"{index}.{name}": _on_cpu(value)
            for index, values in state.items()
            for name, value in values.items()
        }
        advice = "; free some space, then continue with --resume"
        with atomic_output(final, advice, manifest=True) as folder:
            folder.mkdir()
            save_file(weights, folder / "model.safetensors")
            save_file(moments, folder / "optimizer.safetensors")
            save_config(self.config, folder / "training.yaml")
            (folder / "state.json").write_text(json.dumps(self._identity(), indent=1))
        for old in self._checkpoints()[:-1]:
            remove(old)

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step.

        Raises:
            UserError: the checkpoint is damaged, or its settings, data or number of processes
                differ.
        """
        if not (checkpoints := self._checkpoints()):
            return 0
        checkpoint = checkpoints[-1]
        try:
            if (checkpoint / MANIFEST).is_file() and (damage := find_damage(checkpoint)):
                raise ValueError(damage)
            identity = json.loads((checkpoint / "state.json").read_text())
            weights = load_file(checkpoint / "model.safetensors")
            moments = load_file(checkpoint / "optimizer.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {checkpoint} is damaged ({error}): remove {self.config.partial} and "
                "start again"
            ) from None
        self._require_same_settings(checkpoint / "training.yaml")
        now = self._identity()
        if identity["num_processes"] != now["num_processes"]:
            raise UserError(
                f"{self.config.partial} cannot be continued on {now['num_processes']} processes: "
                f"use {identity['num_processes']}, on which the random numbers depend"
            )
        if identity != now:
            raise UserError(
                f"{self.config.partial} was started with other data or perceptual_weights: give "
                "the original ones, or choose another output"
            )
        self.vae.load_state_dict(weights)
        restored = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key, value in moments.items():
            index, _, name = key.partition(".")
            if value.ndim:  # use the memory format of the parameter
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            restored["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(restored)
        return checkpoint_step(checkpoint)

    def _checkpoints(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        return sorted(self.config.partial.glob("step-*"))

    def _identity(self) -> dict[str, Any]:
        """Return the facts that must be the same on resume, apart from the settings."""
        facts = {
            "num_processes": self.accelerator.num_processes,
            "data": self.images.fingerprint(),
        }
        if self.perceptual_sha256 is not None:
            facts["perceptual_weights"] = self.perceptual_sha256
        return facts

    def _require_same_settings(self, path: Path) -> None:
        before, now = flatten(load_config(AutoencoderTrainingConfig, path)), flatten(self.config)
        changed = [
            f"{key} is {value}, was {before[key]}"
            for key, value in now.items()
            if value != before[key] and key not in CHANGEABLE_ON_RESUME
        ]
        if changed:
            raise UserError(
                f"{self.config.partial} cannot be continued with other settings: "
                f"{'; '.join(changed)}. Give --config {path}, or choose another output"
            )


def _on_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU in the contiguous format that safetensors requires."""
    return tensor.detach().cpu().contiguous()
