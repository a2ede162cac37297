"""The autoencoder: the embedded one, opening others, and training one."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moh_dit.__main__ import run_command
from moh_dit.autoencoder import (
    EMBEDDED,
    LatentScaling,
    autoencoder_identity,
    decode_latents,
    downsampling_factor,
    encode_moments,
    latent_scaling,
    latent_shape,
    load_autoencoder,
    sample_posterior,
)
from moh_dit.common.errors import UserError
from moh_dit.data.digits import load_digit_images
from moh_dit.data.pixels import to_float
from moh_dit.training.autoencoder_config import AutoencoderConfig, AutoencoderTrainingConfig
from moh_dit.training.autoencoder_training import train_autoencoder

TINY = AutoencoderConfig(
    block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, mid_block_attention=False
)


def tiny_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
        **options,
    )


@pytest.fixture(scope="module")
def digits_vae():
    return load_autoencoder("digits")


def test_embedded_autoencoder_is_small_frozen_and_safe(digits_vae):
    assert sum(path.stat().st_size for path in EMBEDDED["digits"].iterdir()) < 1_000_000
    assert not digits_vae.training
    assert not any(p.requires_grad for p in digits_vae.parameters())
    assert digits_vae.dtype == torch.float32
    assert latent_shape(digits_vae, 32) == (4, 8, 8)
    state = load_file(EMBEDDED["digits"] / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_embedded_autoencoder_reconstructs_and_forgives_noise(digits_vae):
    pixels = to_float(load_digit_images()[0][::6])
    moments = encode_moments(digits_vae, pixels)
    assert moments.shape == (len(pixels), 8, 8, 8)
    assert moments.dtype == torch.float32
    scaling = latent_scaling(digits_vae)
    mean = sample_posterior(moments, torch.zeros(()), scaling)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))

    def psnr(latents):
        error = (decode_latents(digits_vae, latents) - pixels).square().mean((1, 2, 3))
        return 10 * torch.log10(4 / error)

    assert psnr(mean).mean() > 35
    assert psnr(mean).min() > 28
    sample = sample_posterior(moments, noise, scaling)
    assert psnr(sample).mean() > 30
    assert psnr(mean + 0.2 * noise).mean() > 30
    assert abs(float(sample.std()) - 1) < 0.02
    assert abs(float(sample.mean())) < 0.05


def test_moments_and_scaling_agree_with_diffusers():
    vae = tiny_vae(scaling_factor=0.3, shift_factor=0.2).eval()
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    moments = encode_moments(vae, pixels)
    assert moments.shape == (3, 4, 8, 8)
    noise = torch.randn(3, 2, 8, 8)
    scaling = latent_scaling(vae)
    assert scaling == LatentScaling(0.3, 0.2)
    latents = sample_posterior(moments, noise, scaling)
    expected = (posterior.mean + posterior.std * noise - 0.2) * 0.3
    torch.testing.assert_close(latents, expected.detach())
    decoded = vae.decode(posterior.mode()).sample.clamp(-1, 1).detach()
    mode = sample_posterior(moments, torch.zeros(()), scaling)
    torch.testing.assert_close(decode_latents(vae, mode), decoded, atol=1e-5, rtol=1e-5)


def test_helpers_stay_float32_under_autocast(digits_vae):
    pixels = to_float(load_digit_images()[0][:2])
    expected = encode_moments(digits_vae, pixels)
    latents = torch.randn(2, 4, 8, 8)
    decoded = decode_latents(digits_vae, latents)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encode_moments(digits_vae, pixels), expected)
        torch.testing.assert_close(decode_latents(digits_vae, latents), decoded)


def test_local_and_pipeline_folders(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "alone")
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=2,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_num_groups=4,
        norm_elementwise_affine=False,
    )
    DiTPipeline(transformer, vae, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    identity = autoencoder_identity(vae)
    assert autoencoder_identity(load_autoencoder(tmp_path / "alone")) == identity
    assert autoencoder_identity(load_autoencoder(str(tmp_path / "pipeline"))) == identity
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert autoencoder_identity(vae) != identity


def test_bad_autoencoders_are_named(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(
        UserError, match=r"no diffusion_pytorch_model\.safetensors, and pickle files such as \.bin"
    ):
        load_autoencoder(tmp_path / "pickle")
    with pytest.raises(UserError, match="is a file"):
        load_autoencoder(tmp_path / "pickle" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_autoencoder(tmp_path / "empty")
    vae.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "_class_name": "VQModel"})
    )
    with pytest.raises(
        UserError, match="VQModel, which is not supported: use one of AutoencoderKL, Auto"
    ):
        load_autoencoder(tmp_path / "other")
    vae.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut"):
        load_autoencoder(tmp_path / "cut")
    vae.save_pretrained(tmp_path / "lacking")
    weights = tmp_path / "lacking" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if k != "encoder.conv_in.bias"}, weights)
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias"):
        load_autoencoder(tmp_path / "lacking")
    tiny_vae(latents_mean=(0.0,) * 3, latents_std=(1.0,) * 3).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match=r"has 2 latent channels, but statistics .* of 3"):
        load_autoencoder(tmp_path / "three")
    tiny_vae(latents_mean=(0.0, 0.0)).save_pretrained(tmp_path / "half")
    with pytest.raises(UserError, match="only one of latents_mean and latents_std"):
        load_autoencoder(tmp_path / "half")
    tiny_vae(in_channels=1).save_pretrained(tmp_path / "grey")
    with pytest.raises(UserError, match="does not encode RGB images"):
        load_autoencoder(tmp_path / "grey")


def fake_hub(monkeypatch, folder=None):
    """Replace downloads: return ``folder``, or fail as without network. Return the calls."""
    calls = []

    def snapshot_download(repository, allow_patterns, local_files_only=False):
        calls.append((repository, local_files_only))
        if local_files_only or folder is None:
            raise OSError("[Errno -2] Name or service not known")
        return str(folder)

    monkeypatch.setattr("moh_dit.common.hub.snapshot_download", snapshot_download)
    return calls


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    fake_hub(monkeypatch)
    with pytest.raises(UserError, match=r"autoencoder someone/some-vae.*not known.*local path"):
        load_autoencoder("someone/some-vae")


def test_hub_id_is_looked_up_in_the_cache_first(monkeypatch, tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    calls = fake_hub(monkeypatch, tmp_path)
    loaded = load_autoencoder("someone/some-pipeline")
    assert calls == [("someone/some-pipeline", True), ("someone/some-pipeline", False)]
    assert autoencoder_identity(loaded) == autoencoder_identity(vae)
    assert loaded.config["_name_or_path"] == "someone/some-pipeline"


def test_hub_pickle_is_refused(monkeypatch, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    fake_hub(monkeypatch, tmp_path)
    with pytest.raises(
        UserError, match=r"some-pipeline has no diffusion_pytorch_model\.safetensors"
    ):
        load_autoencoder("someone/some-pipeline")


def test_sizes_must_divide(digits_vae):
    assert downsampling_factor(digits_vae) == 4
    with pytest.raises(UserError, match=r"30 is not divisible.*factor 4: use 28 or 32"):
        latent_shape(digits_vae, 30)


def make_folder(root):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.broadcast_to(rng.integers(0, 255, (1, 1, 3), np.uint8), (16, 16, 3))
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def training(tmp_path, **changes):
    options = dict(
        data=str(make_folder(tmp_path / "data")) if "data" not in changes else changes["data"],
        output=str(tmp_path / "out" / "vae"),
        image_size=16,
        autoencoder=TINY,
        num_steps=60,
        batch_size=4,
        learning_rate=5e-3,
        num_held_out=2,
    )
    return AutoencoderTrainingConfig(**{**options, **changes})


def test_training_learns_measures_and_writes(tmp_path):
    digits = dict(data="digits", num_held_out=20, batch_size=32)
    config = training(tmp_path, **digits)
    metrics = train_autoencoder(config)
    output = tmp_path / "out" / "vae"
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "manifest.json",
        "metrics.json",
        "reconstructions.png",
        "training.yaml",
    ]
    assert list(output.parent.iterdir()) == [output]  # nothing is left aside
    vae = load_autoencoder(output)
    assert vae.config.scaling_factor == pytest.approx(metrics["scaling_factor"])
    assert vae.config.sample_size == 16
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert yaml.safe_load((output / "training.yaml").read_text())["num_steps"] == 60
    short = train_autoencoder(training(tmp_path / "short", **digits, num_steps=1))
    assert metrics["psnr"] > short["psnr"] + 3
    # The same seed gives the same weights.
    again = train_autoencoder(training(tmp_path / "again", **digits))
    assert again == metrics
    # And an existing result is never written over.
    with pytest.raises(UserError, match="exists"):
        train_autoencoder(config)


def test_written_scaling_gives_unit_latents(tmp_path):
    config = training(tmp_path, data="digits", image_size=32, num_steps=20, num_held_out=8)
    train_autoencoder(config)
    vae = load_autoencoder(config.output)
    moments = encode_moments(vae, to_float(load_digit_images()[0][:256]))
    noise = torch.randn(256, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    assert abs(float(sample_posterior(moments, noise, latent_scaling(vae)).std()) - 1) < 0.05


def test_training_can_start_from_another(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "first")
    config = training(
        tmp_path, init_from=str(tmp_path / "first"), learning_rate=1e-9, num_steps=1, image_size=16
    )
    train_autoencoder(config)
    first, second = load_autoencoder(tmp_path / "first"), load_autoencoder(config.output)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=17), "17 is not divisible"),
        (dict(data="nowhere"), "nowhere does not exist"),
        (dict(autoencoder=AutoencoderConfig([8, 9], norm_num_groups=4)), r"\[8, 9\]"),
        (dict(batch_size=64), "too few"),
        (dict(num_steps=0), "num_steps"),
        (dict(init_from="no/such/place"), "no/such/place"),
        (dict(init_from="none"), "PixelAutoencoder whose training is not supported"),
    ],
)
def test_mistakes_stop_before_training(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train_autoencoder(training(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    output = tmp_path / "vae"
    output.mkdir()
    monkeypatch.setattr("sys.argv", ["moh-dit autoencoder", "--output", str(output)])
    with pytest.raises(SystemExit) as stop:
        run_command("autoencoder")
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
    shutil.rmtree(output)


def test_kl_is_that_of_diffusers(tmp_path):
    """The averaged KL of the loss, written out: ½ (μ² + σ² − 1 − log σ²)."""
    from moh_dit.training.autoencoder_training import _Autoencode

    vae = tiny_vae()
    pixels, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 2, 8, 8)
    decoded, kl = _Autoencode(vae)(pixels, noise)
    mean, log_variance = encode_moments(vae, pixels).chunk(2, 1)
    expected = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean((1, 2, 3))
    torch.testing.assert_close(kl, expected)
    assert F.mse_loss(decoded, pixels).requires_grad
