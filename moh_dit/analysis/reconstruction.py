"""Measure an autoencoder on held-out images: rFID, PSNR, SSIM and LPIPS of its reconstructions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fid_eval import EvaluationError
from fid_eval.reconstruction import evaluate_reconstructions
from fid_eval.report import document_of, table, write_json

from ..autoencoder.codec import decode_latents, encode_moments, latent_scaling, sample_posterior
from ..autoencoder.loading import load_autoencoder
from ..common.errors import UserError
from ..data.images import index_batches, open_images, read_batches
from ..data.pixels import to_float, to_pixels
from .config import ReconstructionConfig


def measure_reconstruction(config: ReconstructionConfig) -> None:
    """Encode and decode the images, compare them, print a table and write ``config.output``.

    Images are preprocessed as for training. The posterior mean is decoded and rounded to 8 bits.

    Raises:
        UserError: bad data, autoencoder, weights or metrics.
    """
    images = open_images(config.data, config.image_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_autoencoder(config.autoencoder).to(device).eval()
    scaling, zero = latent_scaling(vae), torch.zeros((), device=device)

    def originals() -> Iterator[np.ndarray]:
        spans = index_batches(range(len(images)), config.batch_size)
        return (batch for batch, _ in read_batches(images, spans, config.num_workers))

    def reconstruct(batch: Tensor) -> Tensor:
        pixels = to_float(batch.permute(0, 2, 3, 1).to(device))
        latents = sample_posterior(encode_moments(vae, pixels), zero, scaling)
        return to_pixels(decode_latents(vae, latents)).permute(0, 3, 1, 2)

    try:
        result = evaluate_reconstructions(
            originals(),
            reconstruct,
            metrics=config.metrics.split(","),
            extractor=config.extractor,
            weights=config.weights,
            weights_sha256=config.weights_sha256,
            backbone=config.backbone,
            batch_size=config.batch_size,
            device=device,
        )
    except EvaluationError as error:
        raise UserError(str(error)) from None
    result.name = config.autoencoder
    result.samples["name"] = config.autoencoder
    result.reference.update(name=config.data, sha256=images.fingerprint())
    document = document_of(result)
    document["settings"] = vars(config)
    write_json(document, Path(config.output))
    print(table(document))
