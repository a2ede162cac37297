"""Weights spread over processes (FSDP2) give the run that whole ones give, and resume."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from processes import launch
from safetensors.torch import load_file

from moh_dit.checkpoints import list_checkpoints, load_pipeline
from moh_dit.errors import UserError
from moh_dit.training import setup
from moh_dit.training.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainConfig
from moh_dit.training.loop import Trainer
from moh_dit.training.record import read_log


class ShardingAccelerator(Accelerator):
    """Accelerate shards on GPUs alone: told to by hand, it does so over gloo, by the same code."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["DiTBlock"],
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )


def train(run_dir, num_steps=4, sharded=False):
    config = TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            hidden_size=20, depth=2, num_heads=5, head_dim=4, num_shared_heads=2,
            num_active_routed_heads=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5),
        evaluation=EvaluationConfig(num_inference_steps=1),
        num_steps=num_steps, batch_size=8, gradient_accumulation_steps=2, checkpoint_every=2,
        log_every=1, ema_decays=[0.9, 0.5], ema_power_stds=[0.1], resume=True,
    )  # fmt: skip
    if sharded:
        setup.Accelerator = ShardingAccelerator
        setup.check_fsdp(ShardingAccelerator(cpu=True))
    trainer = Trainer(config)
    is_sharded = [hasattr(p, "to_local") for p in trainer.raw_model.parameters()]
    assert all(is_sharded) if sharded else not any(is_sharded)
    trainer.train()


def files(run):
    checkpoint = list_checkpoints(run)[-1]
    return {p.relative_to(checkpoint): load_file(p) for p in checkpoint.rglob("*.safetensors")}


def assert_equal(found, expected, atol=0.0):
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[file][name], tensor, atol=atol, rtol=0)


def test_sharded_weights_give_the_same_run_and_either_kind_can_go_on(tmp_path):
    launch(train, tmp_path / "whole", num_processes=2)
    launch(train, tmp_path / "sharded", 4, True, num_processes=2)
    expected, found = files(tmp_path / "whole"), files(tmp_path / "sharded")
    assert len(expected) == 5  # weights, optimizer, two averages, and one of power-function shape
    assert_equal(found, expected, atol=1e-5)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "sharded")]
    for a, b in zip(*logs, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)

    launch(train, tmp_path / "resumed", 2, True, num_processes=2)
    shutil.copytree(tmp_path / "resumed", tmp_path / "gathered")
    launch(train, tmp_path / "resumed", 4, True, num_processes=2)
    assert_equal(files(tmp_path / "resumed"), found)
    launch(train, tmp_path / "gathered", 4, False, num_processes=2)
    assert_equal(files(tmp_path / "gathered"), found, atol=1e-5)

    pipeline = load_pipeline(tmp_path / "sharded", weights="raw")
    key = "blocks.1.attn.qkv.weight"
    raw = found[Path("state/model.safetensors")][key]
    assert torch.equal(pipeline.transformer.state_dict()[key], raw)


def test_sharding_without_gpus_is_refused():
    with pytest.raises(UserError, match="several GPUs"):
        setup.check_fsdp(Accelerator(cpu=True))
