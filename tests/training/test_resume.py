"""Resume runs: after a kill, on another number of processes, with damaged checkpoints."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from helpers.training_runs import (
    MODEL,
    NUM_STEPS,
    assert_identical,
    command,
    environment,
    run,
    tiny_config,
    write_images,
)
from PIL import Image
from safetensors import SafetensorError

import train_dit
from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.checkpoints.runs import WEIGHTS, list_checkpoints
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.latents import open_latents
from moh_dit.training import setup, training_state
from moh_dit.training.config import DataConfig
from moh_dit.training.run_log import RunLog, read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_a_random_moment_and_resumed_is_identical(finished_run, tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run"), env=environment(), stderr=subprocess.DEVNULL
    )
    until = random.randrange(3, NUM_STEPS)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and read_log(log)[-1:] and
                                          read_log(log)[-1]["step"] >= until - 2):  # fmt: skip
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = run(tmp_path / "run", "--resume=true")
    assert finished.returncode == 0, finished.stderr
    assert_identical(finished_run, tmp_path / "run")
    resumed, whole = read_log(log), read_log(finished_run / "log.jsonl")
    for key in ("step", "loss", "grad_norm", "head_load"):
        assert [entry[key] for entry in resumed] == [entry[key] for entry in whole]


def test_a_finished_run_is_left_as_it_is(finished_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    Trainer(tiny_config(finished_run, resume=True)).train()
    assert "is complete at step 12" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_resuming_draws_the_last_grid_that_a_kill_prevented(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    grid = tmp_path / "run" / "samples" / f"step-{NUM_STEPS:08d}.png"
    expected = grid.read_bytes()
    grid.unlink()
    Trainer(tiny_config(tmp_path / "run", resume=True)).train()
    assert grid.read_bytes() == expected


def test_data_may_move_but_not_change(tmp_path):
    write_images(tmp_path / "data")

    def resumed(where, **options):
        data = DataConfig(source=str(tmp_path / where), autoencoder="digits")
        return Trainer(tiny_config(tmp_path / "run", data=data, resume=True, **options))

    resumed("data", num_steps=1).train()
    (tmp_path / "data").rename(tmp_path / "moved")
    resumed("moved", num_steps=2).train()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "moved" / "c0" / "new.png")
    count = len(list((tmp_path / "moved").rglob("*.png")))
    with pytest.raises(
        UserError, match=f"started with other data: {count - 1} images then, {count} images now"
    ):
        resumed("moved", num_steps=3)
    (tmp_path / "moved" / "c0" / "new.png").rename(tmp_path / "moved" / "c0" / "0.png")
    with pytest.raises(UserError, match=f"{count - 1} images, but other content"):
        resumed("moved", num_steps=3)
    (tmp_path / "run" / "data.json").write_text("")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        resumed("moved", num_steps=3)


def settings_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def resume_program(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dit.py", *map(str, arguments), "--resume"])
    train_dit.main()


def write_as_version_0_1_0(run, **changes):
    """Change the settings of a run to those that version 0.1.0 wrote."""
    settings = settings_of(run)
    settings["trackers"] = ["tensorboard"]
    settings["data"]["autoencoder"] = "digits"
    (run / "config.yaml").write_text(yaml.safe_dump(settings | changes))


@pytest.mark.parametrize("autoencoder", [None, "digits"])
def test_a_run_records_its_autoencoder(autoencoder, tmp_path):
    data = DataConfig(autoencoder=autoencoder)
    Trainer(tiny_config(tmp_path / "run", num_steps=1, data=data)).train()
    assert settings_of(tmp_path / "run")["data"]["autoencoder"] == "digits"


def test_a_run_of_version_0_1_0_resumes_by_its_config_and_by_its_command(
    tmp_path, monkeypatch, capsys
):
    """In 0.1.0 the digits autoencoder was the default for any images."""
    run, source = tmp_path / "run", str(write_images(tmp_path / "data"))
    data = DataConfig(source=source, autoencoder="digits")
    Trainer(tiny_config(run, num_steps=1, data=data)).train()
    write_as_version_0_1_0(run)
    resume_program("--config", run / "config.yaml", "--num_steps=2", monkeypatch=monkeypatch)
    assert settings_of(run)["trackers"] == ["tensorboard"]
    original = [f"--data.source={source}", "--num_steps=3"]
    resume_program(*command(run, *original)[2:], monkeypatch=monkeypatch)
    assert settings_of(run)["data"]["autoencoder"] == "digits"
    assert "no longer logging to tensorboard" in capsys.readouterr().out
    assert list_checkpoints(run)[-1].name == "step-00000003"


def test_a_run_that_needs_a_missing_tracker_says_how_to_resume(
    finished_run, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    write_as_version_0_1_0(run)
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [])
    with pytest.raises(SystemExit):
        resume_program("--config", run / "config.yaml", monkeypatch=monkeypatch)
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "tracker tensorboard is not installed" in message
    assert "moh-dit[tracking]" in message
    assert "--trackers '[]'" in message


def test_resuming_does_not_need_the_initial_weights(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "given")
    start = dict(init_from=str(tmp_path / "given"), model=dict.fromkeys(MODEL))
    Trainer(tiny_config(tmp_path / "run", num_steps=1, **start)).train()
    shutil.rmtree(tmp_path / "given")
    trainer = Trainer(tiny_config(tmp_path / "run", num_steps=2, resume=True, **start))
    assert trainer.start_step == 1
    assert trainer.raw_model.config.hidden_size == MODEL["hidden_size"]


def test_resuming_rewrites_a_half_written_autoencoder(tmp_path):
    half = tmp_path / "run" / ".partial-elsewhere-1-01234567-vae"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{")
    Trainer(tiny_config(tmp_path / "run", num_steps=1, resume=True)).train()
    assert load_pipeline(tmp_path / "run").vae.config.latent_channels
    assert not half.exists()


def test_a_checkpoint_without_weights_is_skipped_repeatedly(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    for _ in range(2):
        (list_checkpoints(tmp_path / "run")[-1] / "state" / "model.safetensors").unlink()
        Trainer(tiny_config(tmp_path / "run", resume=True)).train()
        assert_identical(finished_run, tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("damaged-*"))
    assert left == ["damaged-damaged-step-00000012", "damaged-step-00000012"]


def test_two_processes_compute_the_same_run_and_one_can_finish_it(finished_run, tmp_path):
    first = run(tmp_path / "run", "--num_steps=6", processes=2)
    assert first.returncode == 0, first.stderr
    # Both processes encoded a part of the images. One process reuses these latents.
    store = tmp_path / "run" / "latents"
    written = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(open_latents(store)) == 1797
    assert sorted(written) == [
        "index.json",
        "labels.npy",
        "moments-00000-of-00001.npy",
        "moments.crc32.npy",
    ]
    second = run(tmp_path / "run", "--resume=true")
    assert second.returncode == 0, second.stderr
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == written
    a, b = (read_log(d / "log.jsonl") for d in (finished_run, tmp_path / "run"))
    for key in ("mse", "vlb", "balance", "grad_norm"):
        # The order of sums differs, and AdamW at a learning rate of 1e-2 amplifies the rounding.
        assert [entry[key] for entry in b] == pytest.approx([entry[key] for entry in a], rel=1e-2)
        assert b[0][key] == pytest.approx(a[0][key], rel=1e-5)


def test_latents_of_other_images_are_refused(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    encode_data(EncodeConfig(output=str(tmp_path / "run" / "latents"), horizontal_flip=False))
    index = tmp_path / "run" / "latents" / "index.json"
    Trainer(tiny_config(tmp_path / "run", resume=True))
    index.write_text(index.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(UserError, match=r"digits has changed since .*latents was encoded"):
        Trainer(tiny_config(tmp_path / "run", resume=True))


def test_half_written_and_half_deleted_checkpoints_are_removed(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".deleting-step-00000006")
    (checkpoints / ".writing-step-00000015" / "state").mkdir(parents=True)
    (tmp_path / "run" / ".writing-vae").mkdir()
    Trainer(tiny_config(tmp_path / "run", resume=True, num_steps=13, checkpoint_every=100)).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000009", "step-00000012", "step-00000013"
    ]  # fmt: skip
    assert not (tmp_path / "run" / ".writing-vae").exists()


def test_a_damaged_checkpoint_is_skipped(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    for step, name in ((12, "state/optimizer.safetensors"), (9, "ema-0.5/" + WEIGHTS)):
        file = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / name
        file.write_bytes(file.read_bytes()[:-1])
    trainer = Trainer(tiny_config(tmp_path / "run", resume=True))
    assert trainer.start_step == 6
    assert "step-00000012/state/optimizer.safetensors is damaged" in capsys.readouterr().err
    trainer.train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "damaged-step-00000012")
    assert_identical(finished_run, tmp_path / "run")


def test_a_checkpoint_without_an_average_is_skipped(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012" / "ema-0.5")
    assert Trainer(tiny_config(tmp_path / "run", resume=True)).start_step == 9
    assert "step-00000012/ema-0.5/" in capsys.readouterr().err


def test_damaged_checkpoints_are_kept_if_none_is_intact(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint / "ema-0.5")
    with pytest.raises(UserError, match=r"all 3 checkpoints .* are damaged: .*ema-0\.5"):
        Trainer(tiny_config(tmp_path / "run", resume=True))
    assert list_checkpoints(tmp_path / "run") == checkpoints


def test_a_full_disk_while_logging_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def full(self, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "write", full)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "run")[1:])
    with pytest.raises(SystemExit) as end:
        train_dit.main()
    assert end.value.code == 2
    assert "error: the disk is full" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save, calls = training_state.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        save(tensors, path, **options)
        if len(calls) == 6:  # the second file of the second checkpoint
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training_state, "save_file", full)
    trainer = Trainer(tiny_config(tmp_path / "run"))
    with pytest.raises(UserError, match=r"No space left.*resume from .*step-00000003"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_guided_samples_without_label_dropout_are_warned_about(tmp_path, capsys):
    for dropout, count in ((0.0, 1), (0.1, 0)):
        Trainer(tiny_config(tmp_path / str(dropout), label_dropout=dropout))
        assert capsys.readouterr().err.count("null class is never trained") == count
