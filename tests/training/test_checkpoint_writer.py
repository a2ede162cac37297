"""Checkpoints are written in the background: same bytes, errors reported, kills survived."""

import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.training_runs import (
    NUM_STEPS,
    ROOT,
    assert_identical,
    command,
    environment,
    run,
    tiny_config,
)
from safetensors import SafetensorError

from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.training import training_state
from moh_dit.training.checkpoint_writer import CheckpointWriter
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_copies_do_not_change_with_the_tensor_and_reuse_their_memory():
    writer, tensor, written = CheckpointWriter(), torch.ones(3), []
    go = threading.Event()
    for value in (1.0, 2.0):
        writer.wait()
        copy = writer.copy("a", tensor.fill_(value))

        def write(copy=copy):
            assert go.wait(10)
            written.append((copy.tolist(), copy.data_ptr()))

        writer.start(write)
        tensor.fill_(-1)  # training continues
        go.set()
    with writer:
        pass
    assert [values for values, _ in written] == [[1.0] * 3, [2.0] * 3]
    assert written[0][1] == written[1][1]


def check_until_done(writer):
    while writer._pending is not None:
        writer.check()


def fail():
    raise UserError("the disk is full")


def test_errors_of_the_thread_are_raised_by_the_next_check():
    writer = CheckpointWriter()
    writer.start(fail)
    with pytest.raises(UserError, match="the disk is full"):
        check_until_done(writer)
    writer.check()  # reported once
    writer.start(fail)
    with pytest.raises(UserError, match="the disk is full"), writer:
        pass


def test_an_error_of_training_is_not_hidden_by_an_error_of_the_thread(capsys):
    with pytest.raises(ZeroDivisionError), CheckpointWriter() as writer:
        writer.start(fail) or 1 / 0
    assert "the disk is full" in capsys.readouterr().err


def test_training_continues_during_a_write_and_ends_with_the_same_bytes(
    finished_run, tmp_path, monkeypatch
):
    save, go, steps = training_state.save_file, threading.Event(), []

    def wait(*arguments, **options):
        assert go.wait(60)
        save(*arguments, **options)

    monkeypatch.setattr(training_state, "save_file", wait)
    trainer = Trainer(tiny_config(tmp_path / "run"))
    step = trainer._step

    def count(number, *arguments):
        steps.append((number, [path.name for path in list_checkpoints(tmp_path / "run")]))
        if number == 6:  # the checkpoint of step 3 is still being written
            go.set()
        return step(number, *arguments)

    trainer._step = count
    trainer.train()
    assert all(not names for number, names in steps if number <= 6)
    assert_identical(finished_run, tmp_path / "run")


def test_a_full_disk_ends_the_run_in_one_of_the_next_steps(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    trainer = Trainer(tiny_config(tmp_path / "run", num_steps=10**6, checkpoint_every=3))
    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*resume from the start"):
        trainer.train()


# Runs the program with a pause in the background thread, before a checkpoint is renamed.
PAUSING = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from moh_dit.common import atomic_write
publish = atomic_write.publish

def pause(temporary, output):
    if output.name == "step-00000006":
        print("writing", output, flush=True)
        time.sleep(2 if short else 600)
    publish(temporary, output)

atomic_write.publish = pause
short = "--pause=short" in sys.argv
sys.argv = [each for each in sys.argv if not each.startswith("--pause")]
if short:
    sys.argv.append("--num_steps=6")
import train_dit
train_dit.main()
"""


def start_pausing(run_dir, *options):
    """Start a run and wait until its second checkpoint is being written."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSING, str(ROOT), *command(run_dir)[2:], *options],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("writing"):
            return process
    raise AssertionError("the run ended before its second checkpoint")


def test_sigkill_during_a_background_write_leaves_the_checkpoint_before(finished_run, tmp_path):
    process = start_pausing(tmp_path / "run")
    time.sleep(0.2)  # training continues
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000003"]
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    finished = run(tmp_path / "run", "--resume=true")
    assert finished.returncode == 0, finished.stderr
    assert_identical(finished_run, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {f"step-{step:08d}" for step in (6, 9, NUM_STEPS)}


def test_sigterm_waits_for_the_last_checkpoint(tmp_path):
    process = start_pausing(tmp_path / "run", "--pause=short")
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode in (0, 75), output  # 0 if sampling had ended before
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000006"
