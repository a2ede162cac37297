"""Open the training set of a run and load its micro-batches."""

import json
import math
from collections.abc import Generator
from pathlib import Path

import psutil
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from fid_eval.sets.decoding import POLICY_VERSION

from ..autoencoder import autoencoder_identity, moments_shape
from ..common.disk_space import format_bytes
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.config import EncodeConfig
from ..data.encoding import encode_data
from ..data.images import ImageSet, open_images
from ..data.latent_shards import INDEX_FILE
from ..data.latents import LatentSet, encode_images, open_latents
from .config import TrainConfig
from .held_out_split import HeldOutSplit, split_images, splits_data
from .preemption import Preemption
from .step_inputs import BatchPartition, MicroBatchSampler, load_micro_batches

CLASS_FILE = "classes.json"  # in a run folder
WORKERS_FROM = 4096  # images; workers take longer to start than fewer images to decode


class TrainingData:
    """The training set of a run: images that the run encodes, or latents encoded earlier.

    Args:
        run_config: settings of the run, with the name of the autoencoder.
        vae: the autoencoder of the run.
        latent_shape: (C, h, w) of its latents at the image size of the run.
        accelerator: the processes of the run. Rank 0 alone reads through the images.

    Attributes:
        images: the images; ``None`` for latents encoded earlier.
        class_names: name of each class.
        labels: class of each image, int64 (N,).
        latent_shape: shape (C, h, w) of the latents of an image.
        moments_shape: shape of its moments, (2C, h, w), or (C, h, w) without a posterior.
        split: training images and held-out images; ``None`` if the run trains on all images.
        identity: kind, number and content hash of the data, the hash of the autoencoder, the
            decoding policy, the class names and the held-out images. It does not depend on paths.

    Raises:
        UserError: unreadable data, latents of another autoencoder or size, or images whose latents
            do not fit into memory.
    """

    def __init__(
        self,
        run_config: TrainConfig,
        vae: ModelMixin,
        latent_shape: tuple[int, int, int],
        accelerator: Accelerator,
    ):
        self.config = config = run_config.data
        self.vae, self.accelerator = vae, accelerator
        self.num_workers = config.num_workers
        self.images: ImageSet | None = None
        self._latents: LatentSet | None = None
        self.latent_shape = latent_shape
        self.moments_shape = shape = moments_shape(vae, config.image_size)
        if config.latents is not None:
            store = open_latents(config.latents, vae, flip=config.horizontal_flip)
            if store.moments_shape != shape:
                raise UserError(
                    f"latents {config.latents} have moments of shape {store.moments_shape}, but "
                    f"data.image_size {config.image_size} needs {shape}"
                )
            self._latents = store
            self.class_names, self.labels = store.class_names, store.labels
            kind, content_hash = "latents", lambda: store.index["content_hash"]
        else:
            images = self.images = run_on_main_process(
                accelerator,
                lambda: open_images(
                    config.source,
                    config.image_size,
                    skip_unreadable=config.skip_unreadable,
                    earlier_classes=_earlier_classes(Path(run_config.run_dir)),
                ),
            )
            self.class_names, self.labels = images.class_names, images.labels
            kind, content_hash = "images", images.fingerprint
            if accelerator.num_processes == 1:
                self._check_memory(len(images) * math.prod(shape) * 4)
        self.identity = run_on_main_process(
            accelerator,
            lambda: {
                "kind": kind,
                "images": len(self.labels),
                "content": content_hash(),
                "autoencoder": autoencoder_identity(vae),
                "decoding": POLICY_VERSION,
                "classes": list(self.class_names),
            },
        )
        self.split: HeldOutSplit | None = None
        held_out, seed = run_config.evaluation.held_out, run_config.seed
        if held_out is not None and splits_data(held_out):
            source = config.source if config.latents is None else config.latents
            self.split = run_on_main_process(
                accelerator,
                lambda: split_images(held_out, self.labels, seed, source, self.images),
            )
            self.identity["held_out"] = self.split.identity()

    @property
    def latents(self) -> LatentSet:
        """The latents of all images, held-out images included, after :meth:`encode`."""
        assert self._latents is not None
        return self._latents

    def _check_memory(self, moments_bytes: int) -> None:
        needed = moments_bytes * (1 + self.config.horizontal_flip)
        available = psutil.virtual_memory().available
        if needed > available / 2:
            raise UserError(
                f"the latents of {self.config.source} need {format_bytes(needed)} of memory, but "
                f"only {format_bytes(available)} are free: encode them to disk with moh-dit encode "
                "and set data.latents"
            )

    def encode(self, run_dir: Path) -> None:
        """Encode the images on the device of the autoencoder, unless they are encoded already.

        One process encodes into memory. Several processes encode into the run folder together.
        A resumed run uses the latents in its folder, on any number of processes.

        Raises:
            UserError: the latents in the run folder belong to other images.
        """
        if self.images is None:
            return
        config, folder = self.config, run_dir / "latents"
        workers = config.num_workers if len(self.images) >= WORKERS_FROM else 0
        if self.accelerator.num_processes == 1 and not folder.exists():
            flip = config.horizontal_flip
            with Preemption.blocked():  # data-loader workers inherit the blocked SIGTERM
                self._latents = encode_images(self.images, self.vae, flip=flip, num_workers=workers)
            self.num_workers = 0
            return
        if not (folder / INDEX_FILE).exists():
            encoding = EncodeConfig(
                output=str(folder),
                data=config.source,
                image_size=config.image_size,
                autoencoder=config.autoencoder,
                horizontal_flip=config.horizontal_flip,
                skip_unreadable=config.skip_unreadable,
                num_workers=workers,
                resume=True,
            )
            with Preemption.blocked():
                encode_data(encoding, self.images)
        store = open_latents(folder, self.vae, flip=config.horizontal_flip)
        if self.identity["content"] != store.index["data"]["fingerprint"]:
            raise UserError(
                f"{config.source} has changed since {folder} was encoded; choose a new --run_dir"
            )
        self._latents = store

    def micro_batches(
        self, partition: BatchPartition, seed: int, start_step: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield this rank's posterior moments (b, 2C, h, w) and labels (b,), without end.

        Call :meth:`encode` first. Close the generator to end its workers.
        """
        flip = self.config.horizontal_flip
        images = None if self.split is None else self.split.training
        sampler = MicroBatchSampler(len(self.latents), partition, seed, flip, start_step, images)
        device = self.accelerator.device
        return load_micro_batches(self.latents, sampler, self.num_workers, device)


def _earlier_classes(run: Path) -> list[str] | None:
    """Return the class names of a run to be resumed, in order; None for a new run."""
    file = run / CLASS_FILE
    return json.loads(file.read_text()) if file.is_file() else None
