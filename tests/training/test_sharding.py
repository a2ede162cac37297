"""Runs with sharded weights (FSDP2) equal runs without, and can resume each other."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import DynamoBackend
from helpers.processes import launch
from safetensors.torch import load_file

from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.training import setup, sharding
from moh_dit.training import trainer as trainer_module
from moh_dit.training.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainConfig
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer


class ShardingAccelerator(Accelerator):
    """An accelerator that shards over gloo; accelerate itself enables FSDP only on GPUs."""

    reshard_after_forward = True

    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            reshard_after_forward=self.reshard_after_forward,
        )


def make_trainer(run_dir, num_steps, sharded, **settings):
    config = TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            hidden_size=20, depth=5, num_heads=5, head_dim=4, num_shared_heads=2,
            num_active_routed_heads=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5),
        evaluation=EvaluationConfig(num_inference_steps=1),
        num_steps=num_steps, batch_size=8, gradient_accumulation_steps=2, checkpoint_every=2,
        log_every=1, ema_decays=[0.9, 0.5], ema_power_stds=[0.1], resume=True, **settings,
    )  # fmt: skip
    if sharded:
        setup.Accelerator = ShardingAccelerator
        setup.check_fsdp(ShardingAccelerator(cpu=True, mixed_precision=config.mixed_precision))
    trainer = Trainer(config)
    is_sharded = [hasattr(p, "to_local") for p in trainer.raw_model.parameters()]
    assert all(is_sharded) if sharded else not any(is_sharded)
    return trainer


def train(run_dir, num_steps=4, sharded=False, **settings):
    make_trainer(run_dir, num_steps, sharded, **settings).train()


def train_checkpointed(run_dir):
    """Train with activation checkpointing, which recomputes the blocks of a group one by one."""
    train(run_dir, 2, True, gradient_checkpointing=True)


def train_in_bf16(run_dir, sharded, shard=sharding.shard_model):
    """Train two steps from random weights; save the gradients and loss terms of the first."""
    ShardingAccelerator.reshard_after_forward = False
    trainer_module.shard_model = shard
    trainer = make_trainer(run_dir, 2, sharded, mixed_precision="bf16")
    model, guard, first = trainer.raw_model, trainer.guard, {}
    random, named = torch.Generator().manual_seed(0), list(model.named_parameters())
    weights = {name: torch.randn(p.shape, generator=random) / 5 for name, p in named}
    sharding.restore_state(named, trainer.optimizer, weights, {})

    def check_weights(*_):  # after all blocks have run
        for name, parameter in model.named_parameters():
            assert not sharding.is_sharded(parameter)
            rounded = sharded and shard is sharding.shard_model and name.startswith("blocks.")
            assert parameter.dtype == (torch.bfloat16 if rounded else torch.float32)

    def keep(terms, before_update=guard.before_update):
        if not first:
            for name, parameter in zip(guard.names, guard.parameters, strict=True):
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                first[name] = sharding.full_tensor(parameter.grad).clone()
            first["terms"] = terms.clone()
        return before_update(terms)

    model.final_layer.register_forward_pre_hook(check_weights)
    guard.before_update = keep
    trainer.train()
    torch.save(first, run_dir / "first.pt")


def shard_in_float32(model, accelerator, gather_dtype):
    """Replace ``shard_model``: gather all weights in float32."""
    sharding.shard_model(model, accelerator, None)


def train_past_infinity(run_dir, sharded):
    """Train four steps; the loss of the third is infinite."""
    trainer = make_trainer(run_dir, 4, sharded, on_nonfinite="skip")
    loss, calls = trainer.training_step.loss, []

    def poisoned(*arguments):
        calls.append(1)
        value, parts = loss(*arguments)
        return value * (float("inf") if len(calls) == 5 else 1), parts

    trainer.training_step.loss = poisoned
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


def test_sharded_and_unsharded_runs_are_equal_and_resume_each_other(tmp_path):
    launch(train, tmp_path / "whole", num_processes=2)
    launch(train, tmp_path / "sharded", 4, True, num_processes=2)
    expected, found = files(tmp_path / "whole"), files(tmp_path / "sharded")
    assert len(expected) == 5  # weights, optimizer, two EMAs and a power-function average
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


def test_groups_of_blocks_under_activation_checkpointing(tmp_path):
    launch(train, tmp_path / "kept", 2, True, num_processes=2)
    launch(train_checkpointed, tmp_path / "again", num_processes=2)
    assert_equal(files(tmp_path / "again"), files(tmp_path / "kept"))


def test_blocks_gathered_in_bf16_compute_what_autocast_computes(tmp_path):
    launch(train_in_bf16, tmp_path / "whole", False, num_processes=2)
    launch(train_in_bf16, tmp_path / "float32", True, shard_in_float32, num_processes=2)
    launch(train_in_bf16, tmp_path / "bf16", True, num_processes=2)
    assert_equal(files(tmp_path / "bf16"), files(tmp_path / "float32"))
    whole, float32, bf16 = (
        torch.load(tmp_path / name / "first.pt") for name in ("whole", "float32", "bf16")
    )
    for name, value in float32.items():
        assert value.count_nonzero()
        assert torch.equal(bf16[name], value), name
        # DDP sums in another order. A rounding to bf16 would show as an error of 4e-3.
        torch.testing.assert_close(whole[name], value, atol=1e-6 * float(value.abs().max()), rtol=0)
    assert_equal(files(tmp_path / "bf16"), files(tmp_path / "whole"), atol=1e-5)


def test_the_search_for_nonfinite_modules_leaves_no_stale_weights(tmp_path):
    launch(train_past_infinity, tmp_path / "whole", False, num_processes=2)
    launch(train_past_infinity, tmp_path / "sharded", True, num_processes=2)
    assert_equal(files(tmp_path / "sharded"), files(tmp_path / "whole"), atol=1e-5)


def test_sharding_without_gpus_is_refused():
    with pytest.raises(UserError, match="several GPUs"):
        setup.check_fsdp(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("setting", "instead"),
    [("fsdp_activation_checkpointing", "gradient_checkpointing"), ("dynamo_backend", "compile")],
)
def test_accelerate_settings_that_the_trainer_controls_are_refused(monkeypatch, setting, instead):
    accelerator = Accelerator(cpu=True)
    state, plugin = accelerator.state, FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr(state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(state, "fsdp_plugin", plugin, raising=False)
    setup.check_fsdp(accelerator)
    if setting == "dynamo_backend":
        monkeypatch.setattr(state.dynamo_plugin, "backend", DynamoBackend.INDUCTOR)
    else:
        plugin.activation_checkpointing = True
    with pytest.raises(UserError, match=f"{setting} .* --{instead} true"):
        setup.check_fsdp(accelerator)
