"""Every class of autoencoder: normalisation, latents on disk, training, sampling, pipelines."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.autoencoders import CASES, expected_latents, make_autoencoder, reconstruct
from helpers.models import SMALL
from helpers.training_runs import MODEL, write_images
from safetensors.torch import save_file

from moh_dit.autoencoder import (
    autoencoder_identity,
    decode_latents,
    downsampling_factor,
    encode_moments,
    latent_scaling,
    latent_shape,
    load_autoencoder,
    moments_shape,
    sample_posterior,
)
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.images import open_images
from moh_dit.data.latents import encode_images, open_latents
from moh_dit.diffusion.process import make_scheduler
from moh_dit.model.transformer import MoHDiTTransformer2DModel
from moh_dit.pipeline.pipeline import MoHDiTPipeline
from moh_dit.training import progress
from moh_dit.training.config import DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from moh_dit.training.trainer import Trainer

SIZE = 32


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def vae(name):
    return make_autoencoder(name)


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def folder(name, vae, tmp_path):
    if name == "pixels":
        return "none"
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def mean_latents(vae, images):
    return sample_posterior(encode_moments(vae, images), torch.zeros(()), latent_scaling(vae))


def test_latents_are_those_of_the_class_itself(name, vae, images, folder):
    case = CASES[name]
    shape = (case.channels, SIZE // case.factor, SIZE // case.factor)
    assert latent_shape(vae, SIZE) == shape
    assert downsampling_factor(vae) == case.factor
    assert encode_moments(vae, images).shape[1:] == moments_shape(vae, SIZE)
    assert moments_shape(vae, SIZE)[0] == case.channels * (1 + case.posterior)
    latents = mean_latents(vae, images)
    torch.testing.assert_close(latents, expected_latents(name, vae, images))
    decoded = decode_latents(vae, latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(
        decoded, reconstruct(name, vae, images).clamp(-1, 1), rtol=1e-4, atol=1e-5
    )
    opened = load_autoencoder(folder)
    assert autoencoder_identity(opened) == autoencoder_identity(vae)
    torch.testing.assert_close(mean_latents(opened, images), latents)


def test_encode_train_resume_sample_save_and_reopen(name, vae, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "plot_curves", lambda *paths: None)  # the slowest part
    data = write_images(tmp_path / "images")
    latents = tmp_path / "latents"
    encode_data(
        EncodeConfig(data=str(data), image_size=SIZE, autoencoder=folder, output=str(latents))
    )
    store = open_latents(latents, load_autoencoder(folder), flip=True)
    in_memory = encode_images(open_images(data, SIZE), vae, flip=True, progress=False)
    items = [(index, flip) for index in range(4) for flip in (False, True)]
    torch.testing.assert_close(store.__getitems__(items)[0], in_memory.__getitems__(items)[0])

    def train(num_steps):
        Trainer(
            TrainConfig(
                run_dir=str(tmp_path / "run"),
                model=ModelConfig(**MODEL, patch_size=1 if name == "rae" else 2),
                data=DataConfig(latents=str(latents), image_size=SIZE, autoencoder=folder),
                num_steps=num_steps,
                batch_size=2,
                evaluation=EvaluationConfig(num_inference_steps=2),
                checkpoint_every=2,
                resume=num_steps > 2,
            )
        ).train()

    train(2)
    train(3)
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000003"

    def sample(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [0, 1],
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    pipeline = load_pipeline(tmp_path / "run")
    drawn = sample(pipeline)
    assert drawn.shape == (2, 3, SIZE, SIZE)
    pipeline.save_pretrained(tmp_path / "saved", with_code=True)
    for opened in (load_pipeline(tmp_path / "saved"),
                   MoHDiTPipeline.from_pretrained(tmp_path / "saved")):  # fmt: skip
        assert autoencoder_identity(opened.vae) == autoencoder_identity(vae)
        torch.testing.assert_close(sample(opened), drawn)


def test_pixels_open_by_diffusers_with_code(tmp_path):
    model = MoHDiTTransformer2DModel(**SMALL, in_channels=3, out_channels=6)
    MoHDiTPipeline(model, load_autoencoder("none"), make_scheduler(True)).save_pretrained(
        tmp_path / "saved", with_code=True
    )
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["vae"] == ["moh_dit_vae", "PixelAutoencoder"]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(pipeline.vae).__name__ == "PixelAutoencoder"
    assert type(pipeline.vae).__module__.startswith("moh_dit_")  # the code beside the weights
    assert pipeline([0], num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_statistics_file_beside_the_weights(tmp_path, images, suffix):
    """VA-VAE has its mean and standard deviation, (1, C, 1, 1), in a file; see LightningDiT."""
    vae = make_autoencoder("one_channel")
    vae.save_pretrained(tmp_path / "vae")
    statistics = dict(mean=torch.full((1, 1, 1, 1), 0.3), std=torch.full((1, 1, 1, 1), 2.0))
    file = tmp_path / "vae" / f"latents_stats.{suffix}"
    (torch.save if suffix == "pt" else save_file)(statistics, file)
    opened = load_autoencoder(tmp_path / "vae")
    mean = encode_moments(vae, images)[:, :1]
    torch.testing.assert_close(mean_latents(opened, images), (mean - 0.3) / 2)
    assert autoencoder_identity(opened) != autoencoder_identity(vae)
    opened.save_pretrained(tmp_path / "again")  # the configuration now has the statistics
    again = load_autoencoder(tmp_path / "again")
    assert autoencoder_identity(again) == autoencoder_identity(opened)
    torch.testing.assert_close(mean_latents(again, images), (mean - 0.3) / 2)
    file.write_bytes(b"no statistics")
    with pytest.raises(UserError, match=rf"latents_stats.{suffix} does not contain"):
        load_autoencoder(tmp_path / "vae")


def test_an_autoencoder_of_one_size_refuses_others():
    with pytest.raises(UserError, match="64 differs from 32, the only size of this AutoencoderRAE"):
        latent_shape(make_autoencoder("rae"), 64)
