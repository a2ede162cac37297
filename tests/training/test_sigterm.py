"""Told to stop: saved, ended with exit code 75, and nobody left waiting."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch
from helpers.processes import launch
from helpers.training_runs import NUM_STEPS, assert_identical, command, environment, run, tiny

from moh_dit.checkpoints.opening import list_checkpoints
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.training import evaluation as preview
from moh_dit.training import trainer as loop
from moh_dit.training.config import EvaluationConfig
from moh_dit.training.preemption import PREEMPTED, Preemption
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sigterm_saves_and_asks_to_be_requeued(whole, tmp_path):
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
    assert_identical(whole, tmp_path / "run")


def test_sigterm_to_all_processes_of_a_run_saves_and_ends_it(tmp_path):
    """As schedulers send it: to the workers that read latents, too."""
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


def test_sigterm_before_the_first_step_asks_to_be_requeued(tmp_path, monkeypatch):
    encode = loop.encode_training_data

    def told_meanwhile(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(loop, "encode_training_data", told_meanwhile)
    monkeypatch.setattr(Preemption, "_insist", lambda *_: None)  # this process goes on
    with pytest.raises(SystemExit) as end:
        Trainer(tiny(tmp_path / "run"))
    assert end.value.code == PREEMPTED
    assert not (tmp_path / "run").exists()


def test_sigterm_is_heard_where_a_process_waits_for_another(tmp_path):
    """For the first one's answer, in C, where the main thread hears nothing."""
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


def test_the_callers_own_handler_is_back_after_a_run(tmp_path):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    signal.set_wakeup_fd(-1)
    try:
        Trainer(tiny(tmp_path / "run", num_steps=1)).train()
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


LOOKING = dict(
    evaluation=EvaluationConfig(
        sample_every=4, fid_every=4, num_samples=40, num_inference_steps=2,
        feature_extractor="digits", metrics=["fid"],
    ),
    log_every=3,
)  # fmt: skip


def told_during(name, monkeypatch):
    """Have a SIGTERM come when the preview calls ``name``."""
    function = getattr(preview, name)

    def told(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(preview, name, told)


@pytest.mark.parametrize("name", ["sample_grid", "generate", "read_batches"])
def test_sigterm_while_looking_saves_and_the_look_is_made_up_for(
    name, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        told_during(name, patch)
        with pytest.raises(SystemExit) as end:
            Trainer(tiny(run, **LOOKING)).train()
    assert end.value.code == PREEMPTED
    assert list_checkpoints(run)[-1].name == "step-00000004"
    made = {str(path.relative_to(run)) for path in run.glob("*/step-00000004.*")}
    assert made == (set() if name == "sample_grid" else {"samples/step-00000004.png"})
    # What was not logged before is logged with the save.
    assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [3, 4]
    Trainer(tiny(run, resume=True, **LOOKING)).train()
    for step in (4, 8, 12):
        assert (run / "samples" / f"step-{step:08d}.png").exists()
        assert (run / "evaluations" / f"step-{step:08d}.json").exists()
    entries = read_log(run / "log.jsonl")
    assert [entry["step"] for entry in entries if "fd_digits" in entry] == [4, 8, 12]
    assert_identical(whole, run)


def look_until_told(name, run_dir):
    """In each of two processes, of which the second is told during the evaluation."""
    if os.environ["RANK"] == "1":
        told_during(name, pytest.MonkeyPatch())
    with pytest.raises(SystemExit) as end:
        Trainer(tiny(run_dir, **LOOKING)).train()
    (run_dir / f"code-{os.environ['RANK']}").write_text(str(end.value.code))


def fail_while_looking(run_dir):
    """In each of two processes, of which the second runs out of memory."""

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("not enough")

    if os.environ["RANK"] == "1":
        preview.generate = full
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(tiny(run_dir, **LOOKING)).train()


def test_a_process_that_fails_while_all_evaluate_ends_all(tmp_path):
    launch(fail_while_looking, tmp_path / "run", num_processes=2)


@pytest.mark.parametrize("name", ["generate", "read_batches"])
def test_a_process_that_is_told_while_all_evaluate_stops_all(name, tmp_path):
    launch(look_until_told, name, tmp_path / "run", num_processes=2)
    codes = [(tmp_path / "run" / f"code-{rank}").read_text() for rank in (0, 1)]
    assert codes == [str(PREEMPTED)] * 2
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000004"
    assert not (tmp_path / "run" / "evaluations").exists()
