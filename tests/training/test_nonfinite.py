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
    loss, calls = trainer._loss, []

    def poisoned(*arguments):
        calls.append(1)
        value, parts = loss(*arguments)
        return value * (float("nan") if len(calls) == 5 else 1), parts

    monkeypatch.setattr(trainer, "_loss", poisoned)
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
    assert "skipped the update of step 3" in capsys.readouterr().out
    # An entry without finite steps has no averages, because NaN is not valid JSON.
    log = tmp_path / "run" / "log.jsonl"
    assert "NaN" not in log.read_text()
    entries = read_log(log)
    assert [entry.get("skipped_steps", 0) for entry in entries] == [0, 0, 1, 0]
    assert ["loss" in entry and "head_load" in entry for entry in entries] == [1, 1, 0, 1]


def test_fifty_overflows_in_a_row_are_reported():
    weight = torch.nn.Parameter(torch.zeros(2))
    guard = NonFiniteGuard([("weight", weight)], None, None, ("mse",), loss_scaled=True)
    reports = []
    for step in range(1, 121):
        overflow = step != 60  # one finite step restarts the count
        weight.grad = torch.full((2,), float("inf") if overflow else 1.0)
        guard.before_update(step, torch.ones(1))
        reports.append(guard.describe_last_step())
    reported = [step for step, report in enumerate(reports, 1) if report]
    assert reported == [50, 110]
    assert "gradient not finite in weight" in reports[49]
