"""Test cost estimates against published sizes, real models and plain arithmetic."""

import json

import pytest
from helpers.models import PUBLISHED, ROUTED, tiny_pipeline

from moh_dit.__main__ import run_command
from moh_dit.analysis.config import CostConfig
from moh_dit.analysis.cost import estimate_cost
from moh_dit.common.cli import load_config, save_config
from moh_dit.common.config_files import shipped_configs
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.training.config import DataConfig, ModelConfig, TrainConfig


def run(capsys, *arguments):
    run_command("cost", [*map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["S/2-75", "XL/2-90"])
def test_published_models_by_part(name):
    found = estimate_cost(CostConfig(preset=f"MoH-DiT-{name}"))
    parameters = found["parameters"]
    assert parameters["total"] == PUBLISHED[name][0]
    assert sum(parameters.values()) == 2 * parameters["total"]
    assert found["model"]["active_heads"] == PUBLISHED[name][1]
    assert found["model"]["tokens"] == 256
    flops = dict(found["flops_per_image"])
    saved, total = flops.pop("saved_by_skipped_heads"), flops.pop("total")
    assert sum(flops.values()) == total
    dense = flops["attention"] + saved
    assert flops["attention"] / dense == pytest.approx(PUBLISHED[name][1] / found["model"]["heads"])


def test_gpu_hours_are_flops_divided_by_speed():
    asked = dict(preset="DiT-XL/2", num_steps=1000, mixed_precision="bf16", mfu=0.5)
    found = estimate_cost(CostConfig(**asked))["training"]
    # 118.6 GMAC forward (the published figure), three passes' worth, at half of 989.4 TFLOP/s.
    assert found["gpu_hours"] == pytest.approx(
        1000 * 256 * 3 * 2 * 118.6e9 / (0.5 * 989.4e12) / 3600, rel=0.005
    )
    assert found["gpu_hours"] * 3600 * found["images_per_second_per_gpu"] == pytest.approx(256_000)
    slower = estimate_cost(CostConfig(**asked, gpu="A100"))["training"]["gpu_hours"]
    assert slower / found["gpu_hours"] == pytest.approx(989.4 / 312)
    given = estimate_cost(CostConfig(**asked, gpu="?", peak_tflops=100))["training"]
    assert given["gpu_hours"] / found["gpu_hours"] == pytest.approx(9.894)


def test_gpus_and_micro_batches_share_the_batch():
    settings = dict(preset="DiT-S/8", num_gpus=4, gradient_accumulation_steps=2)
    shared = estimate_cost(CostConfig(**settings))["memory_per_gpu"]
    assert shared["batch"] == 256 / 8
    less = estimate_cost(CostConfig(**settings, gradient_checkpointing=True))["memory_per_gpu"]
    assert less["activations"] < shared["activations"] / 4
    assert less["weights"] == shared["weights"]


def test_a_configuration_file_is_what_training_builds(capsys):
    found = json.loads(run(capsys, "--config", "digits", "--json"))
    # The digits' autoencoder halves twice: 32 px are 8 × 8 latents, 16 tokens of patch size 2.
    assert found["model"]["tokens"] == 16
    assert found["training"]["num_steps"] == 2000
    assert found["notes"] == []
    text = run(capsys, "--config", "digits", "--num_steps", 7)
    assert f"{found['parameters']['total']:,}" in text
    assert "7 steps of 64 images" in text


def test_a_run_is_counted_with_its_own_settings(tmp_path):
    pipeline = tiny_pipeline()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    pipeline.transformer.save_pretrained(checkpoint / "transformer")
    config = TrainConfig(batch_size=12, num_steps=34, ema_decays=[0.9, 0.99])
    save_config(config, tmp_path / "run" / "config.yaml")
    for path in (tmp_path / "run", checkpoint):
        found = estimate_cost(CostConfig(checkpoint=str(path), num_gpus=2, num_steps=99))
        assert found["parameters"]["total"] == pipeline.transformer.num_parameters()
        assert found["training"]["num_steps"] == 99
        memory = found["memory_per_gpu"]
        assert memory["batch"] == 6
        assert memory["averages"] == 2 * memory["weights"]
    pipeline.save_pretrained(tmp_path / "saved")
    found = estimate_cost(CostConfig(checkpoint=str(tmp_path / "saved")))
    assert found["training"]["num_steps"] == TrainConfig().num_steps


def test_dense_models_skip_nothing():
    plain = {key: ROUTED[key] for key in ("hidden_size", "depth", "num_heads")}
    found = estimate_cost(CostConfig(model=ModelConfig(**plain)))
    assert found["flops_per_image"]["saved_by_skipped_heads"] == 0
    assert "routers" not in found["parameters"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(preset="MoH-DiT-XL/2-74"), "the nearest are MoH-DiT-XL/2-75"),
        (dict(), "model.hidden_size is not set"),
        (dict(preset="DiT-S/2", checkpoint="x"), "leave out preset"),
        (dict(model=ModelConfig(depth=2), checkpoint="x"), "leave out model.depth"),
        (dict(checkpoint="nowhere"), "nowhere does not exist"),
        (dict(preset="DiT-S/2", mfu=40), "mfu is 40"),
        (dict(preset="DiT-S/2", gpu="abacus"), "its peak is unknown"),
        (dict(preset="DiT-S/2", num_gpus=3), "not divisible by 3"),
        (dict(preset="DiT-S/2", image_size=100), "image_size is 100; it must be a multiple of 8"),
        (dict(preset="DiT-S/8", image_size=72), "use a multiple of 64 pixels"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        estimate_cost(CostConfig(**settings))


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_has_an_estimate(name):
    config = load_config(CostConfig, shipped_configs()[name])
    config.model.num_classes = config.model.num_classes or 10
    found = estimate_cost(config)
    assert found["training"]["batch_size"] == config.batch_size
    assert found["memory_per_gpu"]["activations"] > 0


def test_latents_name_their_autoencoder_and_classes(tmp_path):
    encode_data(EncodeConfig(data="digits", output=str(tmp_path / "latents")))
    config = CostConfig(
        model=ModelConfig(hidden_size=32, depth=1, num_heads=2, patch_size=2),
        data=DataConfig(latents=str(tmp_path / "latents")),
    )
    digits = CostConfig(model=config.model)
    assert estimate_cost(config)["parameters"] == estimate_cost(digits)["parameters"]
    config.data.latents = str(tmp_path / "missing")
    with pytest.raises(UserError, match="missing"):
        estimate_cost(config)
