"""Values that are not finite: found, named, held back."""

import os

import pytest
import torch
from helpers.processes import launch
from helpers.training_runs import tiny

from moh_dit.common.errors import UserError
from moh_dit.training.nonfinite import GradientWatch
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_value_that_is_not_finite_is_caught_where_it_happens(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run"))
    loss, calls = trainer._loss, []

    def poisoned(*arguments):
        calls.append(1)
        value, parts = loss(*arguments)
        return value * (float("nan") if len(calls) == 5 else 1), parts

    monkeypatch.setattr(trainer, "_loss", poisoned)
    with pytest.raises(
        UserError,
        match=r"step 5: mse \S+, vlb \S+, balance \S+; gradient not finite in x_embedder.* "
        r"held back.*step-00000003",
    ):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.raw_model.parameters())


def test_the_module_where_it_begins_is_named(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run"))
    with torch.no_grad():
        trainer.raw_model.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 1: .* first in blocks\.1\.mlp\.fc1\. "):
        trainer.train()


def name_the_module(run_dir):
    """In each of two processes: the second one's share of the batch makes infinities."""
    rank = os.environ["RANK"]
    trainer = Trainer(tiny(run_dir))
    if rank == "1":
        trainer.raw_model.blocks[1].mlp.register_forward_hook(lambda *a: a[-1] + float("inf"))
    with pytest.raises(UserError) as error:
        trainer.train()
    (run_dir / f"error-{rank}").write_text(str(error.value))


def test_a_module_of_another_process_is_named(tmp_path):
    launch(name_the_module, tmp_path / "run", num_processes=2)
    for rank in (0, 1):
        assert "first in blocks.1.mlp" in (tmp_path / "run" / f"error-{rank}").read_text()


def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path, monkeypatch, capsys):
    trainer = Trainer(tiny(tmp_path / "run", num_steps=4, log_every=1, on_nonfinite="skip"))
    loss, calls, weights = trainer._loss, [], []

    def poisoned(*arguments):
        calls.append(1)
        weights.append(trainer.raw_model.final_layer.linear.weight.detach().clone())
        value, parts = loss(*arguments)
        return value * (float("inf") if len(calls) == 3 else 1), parts

    monkeypatch.setattr(trainer, "_loss", poisoned)
    trainer.train()
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert "skipped step 3" in capsys.readouterr().out
    # Averages of no step are left out; NaN would be no JSON.
    log = tmp_path / "run" / "log.jsonl"
    assert "NaN" not in log.read_text()
    entries = read_log(log)
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 0]
    assert ["loss" in entry and "head_load" in entry for entry in entries] == [1, 1, 0, 1]


def test_fp16_gradients_that_no_scale_makes_finite_are_reported():
    weight = torch.nn.Parameter(torch.zeros(2))
    watch = GradientWatch([("weight", weight)], None, None, ("mse",), loss_scaled=True)
    verdicts = []
    for step in range(1, 121):
        overflow = step != 60  # ordinary now and then
        weight.grad = torch.full((2,), float("inf") if overflow else 1.0)
        watch.before_update(step, torch.ones(1))
        verdicts.append(watch.verdict())
    heard = [step for step, verdict in enumerate(verdicts, 1) if verdict]
    assert heard == [50, 110]
    assert "gradient not finite in weight" in verdicts[49]
