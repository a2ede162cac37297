"""Opening runs and pipelines for sampling, and errors for damaged ones."""

import json
import shutil

import pytest
import torch
from helpers.models import tiny_pipeline

from moh_dit.checkpoints.infer_config import state_difference
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.common.errors import UserError
from moh_dit.diffusion.objectives import FlowObjective
from moh_dit.training.ema import Ema


@pytest.fixture
def run(tmp_path):
    """Write a run folder like that of the trainer."""
    pipeline = tiny_pipeline()
    folder = tmp_path / "run"
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for step in (9, 10):
        pipeline.transformer.save_pretrained(folder / f"checkpoints/step-{step:08d}/transformer")
    (folder / "checkpoints" / ".writing-step-00000011").mkdir()
    (folder / "classes.json").write_text(json.dumps(list("abcde")))
    (folder / "config.yaml").write_text("{}")
    return folder


def test_the_newest_complete_checkpoint_is_opened(run):
    shutil.rmtree(run / "checkpoints" / "step-00000009" / "transformer")
    pipeline = load_pipeline(run)
    assert pipeline.label_ids(["e"]) == [4]
    assert not pipeline.transformer.training
    named = load_pipeline(run / "checkpoints" / "step-00000010")
    assert named.transformer.config.depth == pipeline.transformer.config.depth


def test_a_flow_run_samples_with_its_own_scheduler(run):
    shutil.rmtree(run / "scheduler")
    FlowObjective().scheduler.save_pretrained(run / "scheduler")
    pipeline = load_pipeline(run)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.config.prediction_type == "flow_prediction"


def damage(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: damage(next((run / "checkpoints/step-00000010/transformer").glob("*.s*"))),
         "cannot be read as safetensors"),
        (lambda run: damage(next((run / "vae").glob("*.safetensors"))), "vae.* cannot be read"),
        (lambda run: (run / "classes.json").unlink(), "cannot be opened.*classes.json"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint yet"),
        (lambda run: (run / "config.yaml").unlink(), "neither a run folder"),
        (lambda run: shutil.rmtree(run), "does not exist"),
    ],
)  # fmt: skip
def test_damaged_runs_are_reported(spoil, message, run):
    spoil(run)
    with pytest.raises(UserError, match=message):
        load_pipeline(run)


def test_a_damaged_pipeline_is_reported(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    damage(next((tmp_path / "saved" / "transformer").glob("*.safetensors")))
    with pytest.raises(UserError, match="is damaged: it has 100 bytes"):
        load_pipeline(tmp_path / "saved")


def test_differences_name_keys_and_shapes():
    model = tiny_pipeline().transformer
    assert state_difference(model, Ema(model, 0.5).model.state_dict()) == ""
    state = model.state_dict()
    state["extra"] = state.pop("pos_embed")
    state["final_layer.linear.bias"] = torch.zeros(3)
    words = state_difference(model, state)
    assert "missing: pos_embed" in words
    assert "unexpected: extra" in words
    assert "final_layer.linear.bias is (3,), expected (32,)" in words
