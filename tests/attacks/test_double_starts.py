"""Two processes with one output: the second one is told the owner and changes nothing."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.folder_owner import ROOT, folder_owner
from helpers.models import tiny_pipeline
from helpers.processes import multiprocessing
from helpers.training_runs import command, tiny_config

from moh_dit.__main__ import main
from moh_dit.checkpoints.runs import list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.sampling.config import SamplingSettings
from moh_dit.sampling.sample_set import sample_set, set_labels
from moh_dit.training.autoencoder_config import AutoencoderTrainingConfig
from moh_dit.training.autoencoder_training import train_autoencoder
from moh_dit.training.run_log import read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(output):
    labels = set_labels(16, range(5), "balanced", 0)
    sample_set(tiny_pipeline(), SamplingSettings(num_inference_steps=2), output, labels)


# Each program, and the folder that it owns while it writes its output.
PROGRAMS = {
    "train": (lambda output: Trainer(tiny_config(output)), "{}"),
    "encode": (lambda output: encode_data(EncodeConfig(output=str(output))), "{}"),
    "autoencoder": (
        lambda output: train_autoencoder(
            AutoencoderTrainingConfig(data="digits", output=str(output), image_size=32)
        ),
        "{}.partial",
    ),
    "sample": (sample, "{}.partial"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_respects_the_owner_of_its_output(program, tmp_path):
    run, folder = PROGRAMS[program]
    owned = tmp_path / folder.format("output")
    with folder_owner(owned) as owner:
        with pytest.raises(UserError, match=f"is in use by -c, process {owner.pid} on host"):
            run(tmp_path / "output")
        assert [path.name for path in owned.iterdir()] == [".owner.json"]
    assert [path.name for path in tmp_path.iterdir()] == [owned.name]


def train(run_dir, *options):
    """Run `moh-dit train` in this process, with its messages in a file."""
    os.dup2(os.open(f"{run_dir}.stderr", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    main(["train", *command(run_dir, *options)[2:]])


def start(run_dir, *options):
    # Processes of a fork server start fast: it has imported the trainer already.
    process = multiprocessing.get_context("forkserver").Process(
        target=train,
        args=(run_dir, "--log_every=1", "--evaluation.num_inference_steps=1", *options),
    )
    process.start()
    return process


def test_a_second_trainer_ends_and_a_third_one_continues_after_a_kill(tmp_path):
    run = tmp_path / "run"
    first = start(run, "--num_steps=100000")
    try:
        while first.is_alive() and not list_checkpoints(run):
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        log = (run / "log.jsonl").read_bytes()
        second = start(run, "--num_steps=100000", "--resume=true")
        second.join()
        assert second.exitcode == 2
        error = (tmp_path / "run.stderr").read_text()
        assert re.fullmatch(rf"moh-dit train: error: .* process {first.pid} on host .*\n", error)
        assert (run / "log.jsonl").read_bytes() == log
    finally:
        first.kill()
        first.join()
    stopped = read_log(run / "log.jsonl")[-1]["step"]
    third = start(run, f"--num_steps={stopped + 3}", "--resume=true")
    third.join()
    assert third.exitcode == 0, (tmp_path / "run.stderr").read_text()
    steps = [entry["step"] for entry in read_log(run / "log.jsonl")]
    assert steps == list(range(1, stopped + 4))
    assert not (run / ".owner.json").exists()


LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]],
                 env=os.environ | {"TORCHELASTIC_RUN_ID": "none"})
time.sleep(60)
"""
WORKER = """
import time
from moh_dit.common.launcher import end_with_launcher
end_with_launcher(0.05)
print("started", flush=True)
time.sleep(60)
print("survived", flush=True)
"""


def test_workers_end_when_their_launcher_is_killed():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert launcher.stdout.readline() == b"started\n"
    launcher.kill()
    assert launcher.stdout.read() == b""  # read until the worker has ended, too
    launcher.wait()
