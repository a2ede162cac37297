"""NaN and infinite values are found and reported, and their update is skipped."""

import os

import pytest
import torch
from helpers.processes import launch
from helpers.training_runs import tiny_config

from moh_dit.common.errors import UserError
from moh_dit.training.nonfinite import NonFiniteGuard
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_nan_loss_stops_the_run_before_the_update(tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(tmp_path / "run"))
    loss, calls = trainer.training_step.loss, []

    def poisoned(*arguments):
        calls.append(1)
        value, parts = loss(*arguments)
        return value * (float("nan") if len(calls) == 5 else 1), parts

    monkeypatch.setattr(trainer.training_step, "loss", poisoned)
    with pytest.raises(
        UserError,
        match=r"step 5: mse \S+, vlb \S+, balance \S+; gradient not finite in x_embedder.* "
        r"skipped.*step-00000003",
    ):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.raw_model.parameters())


def test_the_first_module_with_infinities_is_reported(tmp_path):
    trainer = Trainer(tiny_config(tmp_path / "run"))
    with torch.no_grad():
        trainer.raw_model.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"step 1: .* such an output: blocks\.1\.mlp\.fc1\. "):
        trainer.train()


def train_with_infinities_on_rank_1(run_dir):
    """Train on this rank; on rank 1 a module returns infinities."""
    rank = os.environ["RANK"]
    trainer = Trainer(tiny_config(run_dir))
    if rank == "1":
        trainer.raw_model.blocks[1].mlp.register_forward_hook(lambda *a: a[-1] + float("inf"))
    with pytest.raises(UserError) as error:
        trainer.train()
    (run_dir / f"error-{rank}").write_text(str(error.value))


def test_all_ranks_report_the_module_of_rank_1(tmp_path):
    launch(train_with_infinities_on_rank_1, tmp_path / "run", num_processes=2)
    for rank in (0, 1):
        assert "such an output: blocks.1.mlp" in (tmp_path / "run" / f"error-{rank}").read_text()


def test_a_skipped_step_changes_no_weights(tmp_path, monkeypatch, capsys):
    trainer = Trainer(tiny_config(tmp_path / "run", num_steps=4, log_every=1, on_nonfinite="skip"))
    loss, calls, weights = trainer.training_step.loss, [], []

    def poisoned(*arguments):
        calls.append(1)
        weights.append(trainer.raw_model.final_layer.linear.weight.detach().clone())
        value, parts = loss(*arguments)
        return value * (float("inf") if len(calls) == 3 else 1), parts

    monkeypatch.setattr(trainer.training_step, "loss", poisoned)
    trainer.train()
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert "skipped the update of step 3" in capsys.readouterr().out
    # An entry without finite steps has no averages, because NaN is not valid JSON.
    log = tmp_path / "run" / "log.jsonl"
    assert "NaN" not in log.read_text()
    entries = read_log(log)
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 0]
    assert ["loss" in entry and "head_load" in entry for entry in entries] == [1, 1, 0, 1]


def test_fifty_overflows_in_a_row_are_reported():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    guard = NonFiniteGuard([("weight", weight)], optimizer, None, ("mse",), scaler=scaler)
    scaler.scale(torch.ones(()))  # creates the scale
    reports = []
    for step in range(1, 121):
        overflow = step != 60  # one finite step restarts the count
        weight.grad = torch.full((2,), float("inf") if overflow else 1.0)
        scaler.unscale_(optimizer)
        terms = torch.ones(1)
        norms = guard.before_update(terms)
        guard.record(step, norms.nonfinite, norms.each, terms)
        scaler.step(optimizer)
        scaler.update(2.0**16)
        reports.append(guard.describe_last_step())
    reported = [step for step, report in enumerate(reports, 1) if report]
    assert reported == [50, 110]
    assert "gradient not finite in weight" in reports[49]


def test_nothing_is_updated_after_the_first_bad_step():
    # The host reads the flag of a step after it has queued the next one.
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guards = {
        stop: NonFiniteGuard([("weight", weight)], optimizer, None, ("mse",), stop=stop)
        for stop in (True, False)
    }
    changed = []
    for stop, guard in guards.items():
        for loss in (1.0, float("nan"), 1.0):
            before, weight.grad = weight.detach().clone(), torch.ones(2)
            norms = guard.before_update(torch.tensor([loss]))
            optimizer.step()
            changed.append((stop, not torch.equal(weight, before), bool(norms.skip)))
    assert changed == [
        (True, True, False), (True, False, True), (True, False, True),
        (False, True, False), (False, False, True), (False, True, False),
    ]  # fmt: skip
