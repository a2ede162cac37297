"""Resuming: after a kill, by other numbers of processes, past damage, with the same data."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.training_runs import (
    MODEL,
    NUM_STEPS,
    assert_identical,
    command,
    environment,
    images,
    run,
    tiny,
)
from PIL import Image
from safetensors import SafetensorError

import train_dit
from moh_dit.checkpoints.opening import WEIGHTS, list_checkpoints, load_pipeline
from moh_dit.common.errors import UserError
from moh_dit.data.config import EncodeConfig
from moh_dit.data.encoding import encode_data
from moh_dit.data.latents import open_latents
from moh_dit.training import training_state as state
from moh_dit.training.config import DataConfig
from moh_dit.training.run_log import RunLog, read_log
from moh_dit.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_a_random_moment_and_resumed_is_identical(whole, tmp_path):
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
    assert_identical(whole, tmp_path / "run")
    steps = [entry["step"] for entry in read_log(log)]
    assert steps == sorted(set(steps))


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    Trainer(tiny(whole, resume=True)).train()
    assert "is done: step 12" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_the_last_grid_is_made_up_for_after_a_kill(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    grid = tmp_path / "run" / "samples" / f"step-{NUM_STEPS:08d}.png"
    expected = grid.read_bytes()
    grid.unlink()
    Trainer(tiny(tmp_path / "run", resume=True)).train()
    assert grid.read_bytes() == expected


def test_a_run_goes_on_with_its_data_wherever_they_lie_and_no_others(tmp_path):
    images(tmp_path / "data")

    def resumed(where, **options):
        data = DataConfig(source=str(tmp_path / where), num_workers=0)
        return Trainer(tiny(tmp_path / "run", data=data, resume=True, **options))

    resumed("data", num_steps=1).train()
    (tmp_path / "data").rename(tmp_path / "moved")
    resumed("moved", num_steps=2).train()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "moved" / "c0" / "new.png")
    count = len(list((tmp_path / "moved").rglob("*.png")))
    with pytest.raises(
        UserError, match=f"began with other data: {count - 1} images then, {count} images now"
    ):
        resumed("moved", num_steps=3)
    (tmp_path / "moved" / "c0" / "new.png").rename(tmp_path / "moved" / "c0" / "0.png")
    with pytest.raises(UserError, match=f"{count - 1} images, but not the same"):
        resumed("moved", num_steps=3)
    (tmp_path / "run" / "data.json").write_text("")
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        resumed("moved", num_steps=3)


def test_weights_to_start_from_are_not_needed_to_go_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "given")
    start = dict(init_from=str(tmp_path / "given"), model=dict.fromkeys(MODEL))
    Trainer(tiny(tmp_path / "run", num_steps=1, **start)).train()
    shutil.rmtree(tmp_path / "given")
    trainer = Trainer(tiny(tmp_path / "run", num_steps=2, resume=True, **start))
    assert trainer.start_step == 1
    assert trainer.raw_model.config.hidden_size == MODEL["hidden_size"]


def test_a_start_that_was_killed_while_it_wrote_the_autoencoder_leaves_nothing_half(tmp_path):
    (tmp_path / "run" / ".writing-vae").mkdir(parents=True)
    (tmp_path / "run" / ".writing-vae" / "config.json").write_text("{")
    Trainer(tiny(tmp_path / "run", num_steps=1, resume=True)).train()
    assert load_pipeline(tmp_path / "run").vae.config.latent_channels
    assert not list((tmp_path / "run").glob(".writing-*"))


def test_a_checkpoint_without_weights_is_passed_over_each_time(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for _ in range(2):
        (list_checkpoints(tmp_path / "run")[-1] / "state" / "model.safetensors").unlink()
        Trainer(tiny(tmp_path / "run", resume=True)).train()
        assert_identical(whole, tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("damaged-*"))
    assert left == ["damaged-damaged-step-00000012", "damaged-step-00000012"]


def test_two_processes_compute_the_same_run_and_one_can_finish_it(whole, tmp_path):
    first = run(tmp_path / "run", "--num_steps=6", processes=2)
    assert first.returncode == 0, first.stderr
    # Both encoded their share, once; one process goes on from there.
    store = tmp_path / "run" / "latents"
    made = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(open_latents(store)) == 1797
    assert sorted(made) == ["index.json", "labels.npy", "moments-00000-of-00001.npy"]
    second = run(tmp_path / "run", "--resume=true")
    assert second.returncode == 0, second.stderr
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == made
    a, b = (read_log(d / "log.jsonl") for d in (whole, tmp_path / "run"))
    for key in ("mse", "vlb", "balance", "grad_norm"):
        # Sums are rounded in another order, and AdamW at 1e-2 lets that grow from step to step.
        assert [entry[key] for entry in b] == pytest.approx([entry[key] for entry in a], rel=1e-2)
        assert b[0][key] == pytest.approx(a[0][key], rel=1e-5)


def test_latents_of_other_images_are_not_trained_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    encode_data(EncodeConfig(output=str(tmp_path / "run" / "latents"), flip=False))
    index = tmp_path / "run" / "latents" / "index.json"
    Trainer(tiny(tmp_path / "run", resume=True))
    index.write_text(index.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(UserError, match=r"digits has changed since .*latents was made"):
        Trainer(tiny(tmp_path / "run", resume=True))


def test_what_a_kill_left_half_written_or_half_deleted_goes_at_the_next_start(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / ".deleting-step-00000006")
    (checkpoints / ".writing-step-00000015" / "state").mkdir(parents=True)
    Trainer(tiny(tmp_path / "run", resume=True, num_steps=13, checkpoint_every=100)).train()
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000009", "step-00000012", "step-00000013"
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for step, name in ((12, "state/optimizer.safetensors"), (9, "ema-0.5/" + WEIGHTS)):
        file = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / name
        file.write_bytes(file.read_bytes()[:-1])
    trainer = Trainer(tiny(tmp_path / "run", resume=True))
    assert trainer.start_step == 6
    assert "step-00000012/state/optimizer.safetensors is damaged" in capsys.readouterr().err
    trainer.train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "damaged-step-00000012")
    assert_identical(whole, tmp_path / "run")


def test_a_checkpoint_without_one_of_the_averages_is_passed_over(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012" / "ema-0.5")
    assert Trainer(tiny(tmp_path / "run", resume=True)).start_step == 9
    assert "step-00000012/ema-0.5/" in capsys.readouterr().err


def test_checkpoints_none_of_which_is_whole_are_left_alone(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint / "ema-0.5")
    with pytest.raises(UserError, match=r"none of the 3 checkpoints .* is whole: .*ema-0\.5"):
        Trainer(tiny(tmp_path / "run", resume=True))
    assert list_checkpoints(tmp_path / "run") == checkpoints


def test_a_disk_that_is_full_while_logging_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "write", full)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "run")[1:])
    with pytest.raises(SystemExit) as end:
        train_dit.main()
    assert end.value.code == 2
    assert "error: the disk is full" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save, calls = state.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        save(tensors, path, **options)
        if len(calls) == 6:  # the second file of the second checkpoint
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    trainer = Trainer(tiny(tmp_path / "run"))
    with pytest.raises(UserError, match=r"No space left.*resume from .*step-00000003"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
