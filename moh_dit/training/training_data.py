"""Open the training set of a run and load its micro-batches."""

import math
from collections.abc import Generator
from pathlib import Path

import psutil
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from ..autoencoder import autoencoder_identity
from ..common.disk_space import format_bytes
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.config import EncodeConfig
from ..data.encoding import encode_data
from ..data.images import ImageSet, open_images
from ..data.latent_shards import INDEX_FILE
from ..data.latents import LatentSet, encode_images, open_latents
from .config import DataConfig
from .step_inputs import BatchPartition, MicroBatchSampler, load_micro_batches


class TrainingData:
    """The training set of a run: images that the run encodes, or latents encoded earlier.

    Args:
        config: the data settings, with the name of the autoencoder.
        vae: the autoencoder of the run.
        latent_shape: (C, h, w) of its latents at the image size of the run.
        accelerator: the processes of the run. Rank 0 alone reads through the images.

    Attributes:
        images: the images; ``None`` for latents encoded earlier.
        class_names: name of each class.
        identity: kind, number and content hash of the data, and the hash of the autoencoder. It
            does not depend on paths.

    Raises:
        UserError: unreadable data, latents of another autoencoder or size, or images whose latents
            do not fit into memory.
    """

    def __init__(
        self,
        config: DataConfig,
        vae: AutoencoderKL,
        latent_shape: tuple[int, int, int],
        accelerator: Accelerator,
    ):
        self.config, self.vae, self.accelerator = config, vae, accelerator
        self.num_workers = config.num_workers
        self.images: ImageSet | None = None
        self._latents: LatentSet | None = None
        moments_shape = (2 * latent_shape[0], *latent_shape[1:])
        if config.latents is not None:
            store = open_latents(config.latents, vae, flip=config.horizontal_flip)
            if store.moments_shape != moments_shape:
                raise UserError(
                    f"latents {config.latents} have moments of shape {store.moments_shape}, but "
                    f"data.image_size {config.image_size} needs {moments_shape}"
                )
            self._latents = store
            self.class_names, num_images = store.class_names, len(store)
            kind, content_hash = "latents", lambda: store.index["content_hash"]
        else:
            images = self.images = run_on_main_process(
                accelerator,
                lambda: open_images(
                    config.source, config.image_size, skip_unreadable=config.skip_unreadable
                ),
            )
            self.class_names, num_images = images.class_names, len(images)
            kind, content_hash = "images", images.fingerprint
            if accelerator.num_processes == 1:
                self._check_memory(num_images * math.prod(moments_shape) * 4)
        self.identity = run_on_main_process(
            accelerator,
            lambda: {
                "kind": kind,
                "images": num_images,
                "content": content_hash(),
                "autoencoder": autoencoder_identity(vae),
            },
        )

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
        if self.accelerator.num_processes == 1 and not folder.exists():
            self._latents = encode_images(self.images, self.vae, flip=config.horizontal_flip)
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
                resume=True,
            )
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
        assert self._latents is not None
        flip = self.config.horizontal_flip
        sampler = MicroBatchSampler(len(self._latents), partition, seed, flip, start_step)
        device = self.accelerator.device
        return load_micro_batches(self._latents, sampler, self.num_workers, device)
