"""`moh-dit reconstruct`: metrics of an autoencoder's reconstructions."""

import json

import numpy as np
import pytest
import torch
from helpers.image_sources import write_folder

from moh_dit.__main__ import run_command
from moh_dit.autoencoder import codec
from moh_dit.autoencoder.loading import load_autoencoder
from moh_dit.data.images import load_batch, open_images
from moh_dit.data.pixels import to_float, to_pixels

pytest.importorskip("torchmetrics")


def run(*arguments):
    run_command("reconstruct", list(map(str, arguments)))


def test_metrics_are_those_of_the_decoded_posterior_mean(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    write_folder(tmp_path / "data", images, np.arange(12) % 2)
    output = tmp_path / "out.json"
    command = ("--autoencoder", "digits", "--data", tmp_path / "data", "--image_size", 32)
    chosen = ("--extractor", "digits", "--metrics", "psnr,rfid", "--batch_size", 5)
    run(*command, *chosen, "--output", output)
    assert "rfd_digits" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["sets"][0]["samples"]["count"] == 12
    assert found["settings"]["autoencoder"] == "digits"

    vae = load_autoencoder("digits").eval()
    before = load_batch(open_images(tmp_path / "data", 32), range(12))[0]
    moments = codec.encode_moments(vae, to_float(before))
    latents = codec.sample_posterior(moments, torch.zeros(()), codec.latent_scaling(vae))
    after = to_pixels(codec.decode_latents(vae, latents)).numpy()
    errors = ((before.astype(float) - after) ** 2).mean((1, 2, 3)) / 255**2
    expected = (-10 * np.log10(errors)).mean()
    assert found["sets"][0]["metrics"]["psnr"] == pytest.approx(expected, rel=1e-4)

    for arguments, message in (
        ((*command, *chosen, "--output", output), "exists"),
        ((*command, "--metrics", "PSNT", "--output", tmp_path / "b.json"), "did you mean 'psnr'"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err
