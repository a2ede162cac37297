"""Measure the loss on held-out images and on as many training images.

Every measurement uses the same images, times and noise. Batches do not depend on the number of
processes or on the training batch size, and the CPU computes the fixed units of the sampling
engine. The result is therefore the same for any number of processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..autoencoder import latent_scaling, sample_posterior
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.config import EncodeConfig
from ..data.encoding import encode_data
from ..data.images import ImageSet, index_batches, open_images
from ..data.latent_shards import INDEX_FILE
from ..data.latents import LatentSet, LatentStore, open_latents
from ..diffusion.objectives import Objective
from ..model.transformer import MoHDiTTransformer2DModel
from ..sampling.engine import REQUEST, evaluation_mode, run_in_units, runs_in_units
from .config import TrainConfig
from .held_out_split import match_classes, warn, warn_of_overlap, warn_of_small_sets
from .preemption import Preemption
from .run_folder import DATA_FILE
from .training_data import TrainingData

TIME_RANGES = 8
BATCH_SIZE = 64
MIN_LOSSES = 256  # with fewer images, each image gets several times
MAX_TIME_SHARE = 0.01


class ImageSample(NamedTuple):
    """Images of a data set: their indices, and the training label of each class of the data."""

    latents: LatentSet
    indices: np.ndarray
    classes: np.ndarray


class ImageSubset:
    """The images of a data set at these indices, as an ``ImageSet``."""

    def __init__(self, images: ImageSet, indices: np.ndarray):
        self.images, self.indices = images, indices
        self.image_size, self.class_names = images.image_size, images.class_names
        self.labels = images.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[int(self.indices[index])]

    def fingerprint(self) -> str:
        return f"{self.images.fingerprint()}, {self.indices.tolist()}"


class HeldOutLoss:
    """Loss of the averaged model on held-out images and on training images.

    Args:
        config: settings of the run, with ``evaluation.held_out``.
        accelerator: the processes of the run. They share the batches of a measurement.
        model: the averaged model.
        objective: objective of the run.
        data: the training data.
        preemption: ends a measurement after SIGTERM.

    Raises:
        UserError: separate held-out images that cannot be read or have other classes or sizes.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: MoHDiTTransformer2DModel,
        objective: Objective,
        data: TrainingData,
        preemption: Preemption,
    ):
        self.config, self.accelerator, self.model = config, accelerator, model
        self.objective, self.data, self.preemption = objective, data, preemption
        self.name = str(config.evaluation.held_out)
        self.separate: ImageSet | LatentStore | None = None
        self.classes = np.arange(len(data.class_names))
        if data.split is not None:
            labels, held_out = data.labels, data.split.held_out
            training = data.split.training
        else:
            self.separate = self._open_separate()
            labels, held_out = self.separate.labels, np.arange(len(self.separate))
            self.classes = match_classes(self.separate.class_names, data.class_names, self.name)
            training = np.arange(len(data.labels))
        number = min(config.evaluation.held_out_images, len(held_out), len(training))
        random = np.random.default_rng((config.seed, 3))
        self.held_out = random.choice(held_out, number, replace=False)
        self.training = random.choice(training, number, replace=False)
        self.draws = -(-MIN_LOSSES // number)
        if accelerator.is_main_process:
            warn_of_small_sets(
                self.classes[labels[held_out]],
                data.labels[training],
                data.class_names,
                config.batch_size,
            )
            self._warn_of_time()

    def _open_separate(self) -> ImageSet | LatentStore:
        data, name = self.config.data, self.name
        if not (Path(name) / INDEX_FILE).is_file():
            skip = data.skip_unreadable
            return run_on_main_process(
                self.accelerator, lambda: open_images(name, data.image_size, skip_unreadable=skip)
            )
        store = open_latents(name, self.data.vae)
        if store.moments_shape != self.data.moments_shape:
            raise UserError(
                f"evaluation.held_out {name} has moments of shape {store.moments_shape}, but "
                f"data.image_size {data.image_size} needs {self.data.moments_shape}"
            )
        return store

    def _warn_of_time(self) -> None:
        config, evaluation = self.config, self.config.evaluation
        intervals = [evaluation.held_out_every]
        if not evaluation.held_out_every:
            intervals = [evaluation.sample_every, evaluation.fid_every]
        interval = min([each for each in intervals if each] or [config.num_steps])
        measured = 2 * self.draws * len(self.held_out)  # forward passes of one image
        trained = 3 * interval * config.batch_size  # a backward pass costs two forward passes
        if (share := measured / (measured + trained)) > MAX_TIME_SHARE:
            warn(
                f"the held-out loss takes about {share:.1%} of the computation; increase "
                "evaluation.held_out_every or reduce evaluation.held_out_images"
            )

    def prepare(self, run_dir: Path) -> None:
        """Encode separate held-out images, and warn if training images have the same content.

        Call this after ``TrainingData.encode``.

        Raises:
            UserError: the held-out images in the run folder differ from the present ones.
        """
        separate, latents, indices = self.separate, self.data.latents, self.held_out
        if separate is not None and not isinstance(separate, LatentStore):
            latents, indices = self._encode(separate, run_dir), np.arange(len(self.held_out))
        elif separate is not None:
            latents = separate
        self.samples = {
            "held_out_loss": ImageSample(latents, indices, self.classes),
            "train_sample_loss": ImageSample(
                self.data.latents, self.training, np.arange(len(self.data.class_names))
            ),
        }

        def compare() -> None:
            if not (run_dir / DATA_FILE).is_file():  # only when the run starts
                self._warn_of_overlap(latents, indices)

        run_on_main_process(self.accelerator, compare)

    def _warn_of_overlap(self, latents: LatentSet, indices: np.ndarray) -> None:
        data = self.data
        training = np.arange(len(data.labels)) if data.split is None else data.split.training
        images = data.images if self.separate is None else self.separate
        if data.images is not None and images is not None and not isinstance(images, LatentStore):
            warn_of_overlap(images, self.held_out.tolist(), data.images, training.tolist())
        elif data.images is None:
            warn_of_overlap(latents, indices.tolist(), data.latents, training.tolist())

    def _encode(self, images: ImageSet, run_dir: Path) -> LatentSet:
        folder, data = run_dir / "held_out", self.config.data
        subset = ImageSubset(images, self.held_out)
        if not (folder / INDEX_FILE).exists():
            encoding = EncodeConfig(
                output=str(folder),
                data=self.name,
                image_size=data.image_size,
                autoencoder=data.autoencoder,
                horizontal_flip=False,
                resume=True,
            )
            encode_data(encoding, subset)
        store = open_latents(folder, self.data.vae)
        fingerprint = run_on_main_process(self.accelerator, subset.fingerprint)
        if store.index["data"]["fingerprint"] != fingerprint:
            raise UserError(
                f"run {run_dir} started with other held-out images than {self.name} has now; give "
                f"the original evaluation.held_out and held_out_images, or remove {folder} to "
                "measure these from now on"
            )
        return store

    def measure(self) -> dict[str, Any]:
        """Return both losses, and their values in each of eight ranges of time.

        Raises:
            Interrupted: a process received SIGTERM; raised on all ranks.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        count = self.draws * len(self.held_out)
        jobs = [
            (name, number, entries)
            for name in self.samples
            for number, entries in enumerate(index_batches(range(count), BATCH_SIZE))
        ]
        losses: dict[tuple[str, int], np.ndarray] = {}
        failure: Exception | None = None
        try:
            with evaluation_mode(self.model):
                for name, number, entries in jobs[rank::world_size]:
                    self.preemption.raise_if_received()
                    losses[name, number] = self._losses(self.samples[name], np.array(entries))
        except Exception as error:  # raised below on all ranks, so that no rank waits forever
            failure = error
        for raised, others in gather_object([(failure, losses)]):
            if raised is not None:
                raise raised
            losses |= others
        result: dict[str, Any] = {}
        ranges = self._time_ranges(np.arange(count))
        for name in self.samples:
            batches = [losses[key] for key in sorted(losses) if key[0] == name]
            values = np.concatenate(batches).astype(np.float64)
            by_time = [float(values[ranges == each].mean()) for each in range(TIME_RANGES)]
            result[name] = float(np.mean(by_time))
            result[f"{name}_by_time"] = by_time
        return result

    def _time_ranges(self, entries: np.ndarray) -> np.ndarray:
        """Return the range of time of each entry; entry ``d·N + p`` is draw d of image p."""
        draw, position = np.divmod(entries, len(self.held_out))
        return (position + draw) % TIME_RANGES

    def _losses(self, sample: ImageSample, entries: np.ndarray) -> np.ndarray:
        """Return the squared error of each entry as training weights it, float32 (B,)."""
        device = self.accelerator.device
        positions = entries % len(self.held_out)
        items = [(index, False) for index in sample.indices[positions].tolist()]
        moments, labels = sample.latents.__getitems__(items)
        labels = torch.from_numpy(sample.classes[labels.numpy()]).to(device)
        posterior_noise, noise, times = (each.to(device) for each in self._draw(entries))
        latents = sample_posterior(
            moments.to(device), posterior_noise, latent_scaling(self.data.vae)
        )

        @torch.no_grad()
        def compute(requests: np.ndarray) -> np.ndarray:
            # Padding has position -1 and computes the first entry again.
            rows = torch.from_numpy(requests["position"].clip(0)).to(device)
            noisy = self.objective.add_noise(latents[rows], noise[rows], times[rows])
            with self.accelerator.autocast():
                output = self.model(noisy, times[rows], labels[rows]).sample
            mse, _ = self.objective.loss(output, latents[rows], noise[rows], times[rows])
            return mse.float().cpu().numpy()

        requests = np.zeros(len(entries), REQUEST)
        requests["index"], requests["position"] = entries, np.arange(len(entries))
        if runs_in_units(self.model):
            return run_in_units(self.model, compute, requests)
        return compute(requests)

    def _draw(self, entries: np.ndarray) -> Iterator[Tensor]:
        """Draw posterior noise and noise (B, C, h, w), and times (B,), the same for both samples.

        The numbers of an entry depend only on the seed of the run and on the entry. They are drawn
        on the CPU, so that they are the same on a GPU.
        """
        noise = np.empty((2, len(entries), *self.data.latent_shape), np.float32)
        quantiles = np.empty(len(entries))
        for row, (entry, time_range) in enumerate(
            zip(entries.tolist(), self._time_ranges(entries).tolist(), strict=True)
        ):
            random = np.random.default_rng((self.config.seed, 4, entry))
            quantiles[row] = (time_range + random.random()) / TIME_RANGES
            noise[:, row] = random.standard_normal(noise[:, row].shape, np.float32)
        yield from torch.from_numpy(noise)
        yield self.objective.times_at(torch.from_numpy(quantiles))
