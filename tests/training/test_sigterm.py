"""SIGTERM saves the run, ends it with exit code 75, and leaves no process waiting."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch
from helpers.processes import launch
from helpers.training_runs import (
    NUM_STEPS,
    assert_identical,
    command,
    environment,
    run,
    tiny_config,
)

from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.training import evaluation
from moh_dit.training.config import EvaluationConfig
from moh_dit.training.preemption import PREEMPTED, Preemption
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer
from moh_dit.training.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sigterm_saves_the_run_and_exits_with_75(finished_run, tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run", "--log_every=1"), env=environment(), stderr=subprocess.DEVNULL
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == PREEMPTED
    stopped = int(list_checkpoints(tmp_path / "run")[-1].name[5:])
    assert 1 <= stopped < NUM_STEPS
    assert run(tmp_path / "run", "--resume=true", "--log_every=1").returncode == 0
    assert_identical(finished_run, tmp_path / "run")


def test_sigterm_to_all_processes_of_a_run_saves_and_ends_it(tmp_path):
    """Schedulers send SIGTERM also to the data-loader workers."""
    encode_data(EncodeConfig(output=str(tmp_path / "latents")))
    options = [f"--data.latents={tmp_path / 'latents'}", "--data.num_workers=2"]
    process = subprocess.Popen(
        command(tmp_path / "run", "--log_every=1", *options), env=environment(),
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == PREEMPTED
    assert 1 <= int(list_checkpoints(tmp_path / "run")[-1].name[5:]) < NUM_STEPS
    assert run(tmp_path / "run", "--resume=true", "--log_every=1", *options).returncode == 0
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{NUM_STEPS:08d}"


def test_sigterm_before_the_first_step_exits_with_75(tmp_path, monkeypatch):
    encode = TrainingData.encode

    def encode_after_sigterm(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(TrainingData, "encode", encode_after_sigterm)
    monkeypatch.setattr(Preemption, "_exit_if_blocked", lambda *_: None)  # keep pytest running
    with pytest.raises(SystemExit) as end:
        Trainer(tiny_config(tmp_path / "run"))
    assert end.value.code == PREEMPTED
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_a_process_that_waits_for_another(tmp_path):
    """Rank 1 waits for rank 0 in C code, where Python runs no signal handlers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        alone = environment() | {
            "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]),
        }  # fmt: skip
        process = subprocess.Popen(command(tmp_path / "run"), env=alone, stderr=subprocess.DEVNULL)
        silent.settimeout(60)
        with silent.accept()[0]:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == PREEMPTED
    assert not (tmp_path / "run").exists()


def test_the_previous_handler_is_restored_after_a_run(tmp_path):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    signal.set_wakeup_fd(-1)
    try:
        Trainer(tiny_config(tmp_path / "run", num_steps=1)).train()
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


EVALUATING = dict(
    evaluation=EvaluationConfig(
        sample_every=4, fid_every=4, num_samples=40, num_inference_steps=2,
        feature_extractor="digits", metrics=["fid"],
    ),
    log_every=3,
)  # fmt: skip


def raise_sigterm_in(name, monkeypatch):
    """Raise SIGTERM when the evaluation calls the function ``name``."""
    function = getattr(evaluation, name)

    def call_after_sigterm(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(evaluation, name, call_after_sigterm)


@pytest.mark.parametrize("name", ["sample_grid", "generate", "read_batches"])
def test_sigterm_during_an_evaluation_saves_and_resuming_repeats_it(
    name, finished_run, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_sigterm_in(name, patch)
        with pytest.raises(SystemExit) as end:
            Trainer(tiny_config(run, **EVALUATING)).train()
    assert end.value.code == PREEMPTED
    assert list_checkpoints(run)[-1].name == "step-00000004"
    written = {str(path.relative_to(run)) for path in run.glob("*/step-00000004.*")}
    assert written == (set() if name == "sample_grid" else {"samples/step-00000004.png"})
    # Steps that were not logged yet are logged when the run is saved.
    assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [3, 4]
    Trainer(tiny_config(run, resume=True, **EVALUATING)).train()
    for step in (4, 8, 12):
        assert (run / "samples" / f"step-{step:08d}.png").exists()
        assert (run / "evaluations" / f"step-{step:08d}.json").exists()
    entries = read_log(run / "log.jsonl")
    assert [entry["step"] for entry in entries if "fd_digits" in entry] == [4, 8, 12]
    assert_identical(finished_run, run)


def evaluate_until_sigterm(name, run_dir):
    """Train on this rank; rank 1 receives SIGTERM during the evaluation."""
    if os.environ["RANK"] == "1":
        raise_sigterm_in(name, pytest.MonkeyPatch())
    with pytest.raises(SystemExit) as end:
        Trainer(tiny_config(run_dir, **EVALUATING)).train()
    (run_dir / f"code-{os.environ['RANK']}").write_text(str(end.value.code))


def evaluate_out_of_memory(run_dir):
    """Train on this rank; rank 1 runs out of memory during the evaluation."""

    def run_out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("not enough")

    if os.environ["RANK"] == "1":
        evaluation.generate = run_out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(tiny_config(run_dir, **EVALUATING)).train()


def test_an_error_on_one_rank_during_an_evaluation_ends_all_ranks(tmp_path):
    launch(evaluate_out_of_memory, tmp_path / "run", num_processes=2)


@pytest.mark.parametrize("name", ["generate", "read_batches"])
def test_sigterm_on_one_rank_during_an_evaluation_stops_all_ranks(name, tmp_path):
    launch(evaluate_until_sigterm, name, tmp_path / "run", num_processes=2)
    codes = [(tmp_path / "run" / f"code-{rank}").read_text() for rank in (0, 1)]
    assert codes == [str(PREEMPTED)] * 2
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000004"
    assert not (tmp_path / "run" / "evaluations").exists()
