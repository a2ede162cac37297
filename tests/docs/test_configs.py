"""Every shipped configuration is whole, fits the others, and trains."""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from helpers.training_runs import write_images

from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common.cli import load_config
from moh_dit.common.config_files import shipped_configs
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.model.presets import MOH_PLANS, PRESETS
from moh_dit.training.config import TrainConfig
from moh_dit.training.run_log import read_log
from moh_dit.training.setup import create_model
from moh_dit.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {
    f"MoH-DiT-{name}": "imagenet256_moh_dit_" + name.lower().replace("/", "").replace("-", "_")
    for name in MOH_PLANS
}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Recipes differ in precision, which accelerate fixes once in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """An image folder, and its latents by the embedded autoencoder."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images")
    source, output = str(folder / "images"), str(folder / "latents")
    encode_data(EncodeConfig(data=source, output=output, autoencoder="digits", image_size=32))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, tiny_data, tmp_path):
    config = load_config(TrainConfig, shipped_configs()[name])
    config.run_dir = str(tmp_path / "run")
    config.data.image_size, config.data.autoencoder = 32, "digits"
    if config.data.latents is not None:
        config.data.latents, config.data.num_workers = str(tiny_data / "latents"), 0
    else:
        config.data.source = str(tiny_data / "images")
    if config.evaluation.held_out is not None:
        config.evaluation.held_out = str(tiny_data / "images")
    # Narrow, but with every layer and head of the recipe.
    config.model.hidden_size, config.model.head_dim = 16, 2
    config.num_steps, config.batch_size, config.compile = 2, 4, False
    config.optimizer.lr_warmup_steps = min(config.optimizer.lr_warmup_steps, 1)
    config.evaluation.num_inference_steps = 1
    if config.init_from is not None:
        config.init_from = None
        objective = config.objective.build("cpu")
        create_model(config, objective, (4, 8, 8), 5).save_pretrained(tmp_path / "pretrained")
        config.init_from = str(tmp_path / "pretrained")
    Trainer(config).train()
    entry, *_ = read_log(tmp_path / "run" / "log.jsonl")
    assert torch.tensor(entry["loss"]).isfinite()
    trained = load_pipeline(tmp_path / "run").transformer.config
    if config.model.preset is not None:
        assert trained.num_heads == PRESETS[config.model.preset]["num_heads"]


def test_the_published_recipes_differ_in_model_and_length_alone():
    whole = {preset: yaml.safe_load((FOLDER / f"{file}.yaml").read_text())
             for preset, file in PUBLISHED.items()}  # fmt: skip
    lengths = {"MoH-DiT-XL/2-90": 7_000_000, "MoH-DiT-XL/2-75": 2_000_000}
    rest = []
    for preset, recipe in whole.items():
        assert recipe["model"].pop("preset") == preset
        assert recipe.pop("num_steps") == lengths.get(preset, 400_000)
        assert recipe.pop("run_dir") == f"runs/{PUBLISHED[preset]}"
        recipe.pop("checkpoint_every")
        rest.append(recipe)
    assert len(rest) == 8
    assert all(recipe == rest[0] for recipe in rest)
    assert rest[0]["batch_size"] == 256
    assert rest[0]["optimizer"]["learning_rate"] == 1e-4
    assert rest[0]["ema_decays"] == [0.9999]


@pytest.mark.parametrize("name", sorted(p.stem for p in (FOLDER / "accelerate").glob("*.yaml")))
def test_accelerate_reads_its_file(name):
    config = load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(name, 8)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] is False


def test_the_cluster_script_requeues_a_job_that_asks_for_it(tmp_path):
    """With stand-ins for the cluster's commands: exit code 75 is requeued, others are passed on."""
    for command, body in {
        "srun": "exit $CODE", "scontrol": 'echo "$@" >> called', "python": "exit 0",
    }.items():  # fmt: skip
        (tmp_path / command).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / command).chmod(0o755)
    requeued = {}
    for code in (0, 2, 75):
        (tmp_path / "called").write_text("")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code),
                       "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"}  # fmt: skip
        script = ["bash", str(FOLDER / "slurm" / "train.sbatch"), "--config", "digits"]
        assert subprocess.run(script, cwd=tmp_path, env=environment).returncode == code
        requeued[code] = "requeue 7" in (tmp_path / "called").read_text()
    assert requeued == {0: False, 2: False, 75: True}
